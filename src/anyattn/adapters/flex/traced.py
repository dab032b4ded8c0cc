"""Operators that make block masks in code that torch.compile traces, outside the graph.

Inductor's CPU code (torch 2.13) takes no tensor made in the graph inside a mask function, and none of lengths. With
dynamic lengths it can't compile the ordering of a function mask's blocks for gradients (torch 2.11 on an H100:
CantSplit). With these operators the kernel gets a boolean mask and block indices in memory, as outside compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.lowering.dense import key_mask
from anyattn.masks.block_masks import BLOCK, band_blocks, block_counts, ordered


@torch.library.custom_op("anyattn::flex_keys", mutates_args=())
def flex_keys(key: Tensor, seqlen_kv: int, padded: int) -> Tensor:
    """Return a key mask as boolean `(B or 1, padded)`."""
    keys = key_mask(key, seqlen_kv)[:, 0, 0]
    return F.pad(keys, (0, padded - seqlen_kv)).clone(memory_format=torch.contiguous_format)


@flex_keys.register_fake
def _(key: Tensor, seqlen_kv: int, padded: int) -> Tensor:
    return key.new_empty((key.shape[0], padded), dtype=torch.bool)


@torch.library.custom_op("anyattn::flex_blocks", mutates_args=())
def flex_blocks(
    keys: Tensor, low: int | None, high: int | None, seqlen_q: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the block tensors of a BlockMask for a band and keys, in the order of its arguments."""
    return _blocks(*band_blocks(seqlen_q, keys.shape[1], keys.device, low=low, high=high, keys=keys))


@flex_blocks.register_fake
def _(keys: Tensor, low: int | None, high: int | None, seqlen_q: int) -> tuple[Tensor, ...]:
    rows, columns = -(-seqlen_q // BLOCK[0]), -(-keys.shape[1] // BLOCK[1])
    return _blank(keys, keys.shape[0], 1, rows, columns)


def _blocks(some: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    partial = some & ~whole
    columns = partial.transpose(-1, -2), whole.transpose(-1, -2)
    return (*ordered(partial), *ordered(whole), *ordered(columns[0]), *ordered(columns[1]))


def _blank(like: Tensor, batch: int, heads: int, rows: int, columns: int) -> tuple[Tensor, ...]:
    shapes = tuple((batch, heads, *sizes) for sizes in ((rows,), (rows, columns), (columns,), (columns, rows)))
    return tuple(like.new_empty(shapes[place], dtype=torch.int32) for place in (0, 1, 0, 1, 2, 3, 2, 3))


@torch.library.custom_op("anyattn::flex_counted_blocks", mutates_args=())
def flex_counted_blocks(counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the same from the number of allowed positions per block, `(B or 1, H or 1, rows, columns)`."""
    return _blocks(counts > 0, counts == BLOCK[0] * BLOCK[1])


@flex_counted_blocks.register_fake
def _(counts: Tensor) -> tuple[Tensor, ...]:
    return _blank(counts, *counts.shape)


def function_block_mask(
    mask_mod: Any, batch: int | None, heads: int | None, seqlen_q: int, seqlen_kv: int, device: torch.device
) -> Any:
    """Make the block mask of a function in traced code; inductor counts without the whole mask in memory."""
    from torch.nn.attention.flex_attention import BlockMask

    counts = block_counts(mask_mod, batch, heads, seqlen_q, seqlen_kv, device, BLOCK)
    blocks = torch.ops.anyattn.flex_counted_blocks(counts)
    arguments: tuple[Any, ...] = ((seqlen_q, seqlen_kv), *blocks, BLOCK, mask_mod)
    return BlockMask(*arguments)


def band_block_mask(mask_mod: Any, keys: Tensor, low: int | None, high: int | None, seqlen_q: int) -> Any:
    """Make the block mask of a band and of keys from `flex_keys` in traced code."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = torch.ops.anyattn.flex_blocks(keys, low, high, seqlen_q)
    arguments: tuple[Any, ...] = ((seqlen_q, keys.shape[1]), *blocks, BLOCK, mask_mod)
    return BlockMask(*arguments)
