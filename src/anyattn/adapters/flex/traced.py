"""Operators for key masks in code that torch.compile traces: what reads them is kept out of the graph.

Inductor's CPU code (torch 2.13) takes no tensor made in the graph inside a mask function, and none of lengths. Through
these operators the kernel gets what it gets outside compiled code: a boolean mask and block indices, in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.block_masks import BLOCK, band_blocks, ordered
from anyattn.lowering import key_mask


@torch.library.custom_op("anyattn::flex_keys", mutates_args=())
def flex_keys(key: Tensor, seqlen_kv: int, padded: int) -> Tensor:
    """Write a key mask out as boolean `(B or 1, padded)`."""
    keys = key_mask(key, seqlen_kv)[:, 0, 0]
    return F.pad(keys, (0, padded - seqlen_kv)).clone(memory_format=torch.contiguous_format)


@flex_keys.register_fake
def _(key: Tensor, seqlen_kv: int, padded: int) -> Tensor:
    return key.new_empty((key.shape[0], padded), dtype=torch.bool)


@torch.library.custom_op("anyattn::flex_blocks", mutates_args=())
def flex_blocks(
    keys: Tensor, low: int | None, high: int | None, seqlen_q: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give what a BlockMask of a band and of keys holds, in the order in which it takes them."""
    some, whole = band_blocks(seqlen_q, keys.shape[1], keys.device, low=low, high=high, keys=keys)
    partial = some & ~whole
    columns = partial.transpose(-1, -2), whole.transpose(-1, -2)
    return (*ordered(partial), *ordered(whole), *ordered(columns[0]), *ordered(columns[1]))


@flex_blocks.register_fake
def _(keys: Tensor, low: int | None, high: int | None, seqlen_q: int) -> tuple[Tensor, ...]:
    batch, rows, columns = keys.shape[0], -(-seqlen_q // BLOCK[0]), -(-keys.shape[1] // BLOCK[1])
    shapes = ((batch, 1, rows), (batch, 1, rows, columns), (batch, 1, columns), (batch, 1, columns, rows))
    return tuple(keys.new_empty(shapes[place], dtype=torch.int32) for place in (0, 1, 0, 1, 2, 3, 2, 3))


def band_block_mask(mask_mod: Any, keys: Tensor, low: int | None, high: int | None, seqlen_q: int) -> Any:
    """Make the block mask of a band and of keys from `flex_keys`, in traced code."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = torch.ops.anyattn.flex_blocks(keys, low, high, seqlen_q)
    arguments: tuple[Any, ...] = ((seqlen_q, keys.shape[1]), *blocks, BLOCK, mask_mod)
    return BlockMask(*arguments)
