"""What is known of a call without reading values: facts of its tensors and mask, and its other arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn.masks import scalars
from anyattn.masks.block_masks import block_spec
from anyattn.masks.functions import MaskFunction
from anyattn.masks.objects import Mask, Pattern
from anyattn.masks.values import Known, MadeFor
from anyattn.process.tracing import needs_gradient, static_shape
from anyattn.types.spec import UNKNOWN, BlockSpec, Layout

Lengths = tuple[Tensor, Tensor, int, int]
"""cu_seqlens_q and cu_seqlens_k, int32 `(B + 1,)`, then max_seqlen_q and max_seqlen_k of a packed call."""


class Facts(NamedTuple):
    """What is known of one tensor without reading it; sizes are ints or UNKNOWN."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class MaskFacts(NamedTuple):
    """What is known of a mask without reading it.

    Attributes:
        pattern: `(left, right, align)`.
        key: The key mask.
        dense: The dense mask.
        block: The block mask.
        seqlens: The lengths that a block mask was made for.
        live: Whether every row is known to have a key.
        prefix: Whether the allowed keys are known to come first in each batch entry.
    """

    pattern: Pattern | None = None
    key: Facts | None = None
    dense: Facts | None = None
    block: BlockSpec | None = None
    seqlens: tuple[int, int] | None = None
    live: bool = False
    prefix: bool = False


class Options(NamedTuple):
    """The arguments of a call that aren't tensors."""

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    return_lse: bool = False
    layout: Layout = "BSHD"


def plain_options(options: Options) -> Options:
    """Convert numbers and flags of any type to Python's own.

    Raises:
        InvalidCallError: If one is a tensor whose value can't be read.
    """
    return Options(
        scalars.number("dropout_p", options.dropout_p),
        scalars.flag("is_causal", options.is_causal),
        scalars.number("scale", options.scale),
        scalars.flag("enable_gqa", options.enable_gqa),
        scalars.window(options.window),
        scalars.number("softcap", options.softcap),
        scalars.flag("return_lse", options.return_lse),
        options.layout,
    )


def facts_of(tensor: Tensor) -> Facts:
    """Return the facts of a tensor; its sizes may be symbols while it is traced."""
    return Facts(static_shape(tensor), tensor.dtype, tensor.device, needs_gradient(tensor))


_INTS = frozenset((int,))


def all_plain(shape: tuple[Any, ...]) -> bool:
    """Whether every size is a plain int."""
    return _INTS.issuperset(map(type, shape))


def agree(first: int, second: int) -> bool:
    """Whether two sizes may be the same; an unknown one agrees with every other."""
    return first == second or UNKNOWN in (first, second)


def shape_text(facts: Facts) -> str:
    """Write a shape for a message; `?` is an unknown size."""
    return "(" + ", ".join("?" if size == UNKNOWN else str(size) for size in facts.shape) + ")"


def mask_facts(mask: Mask | None, known: Known) -> MaskFacts:
    """Return a mask's facts, without the parts known to allow everything."""
    if mask is None:
        return MaskFacts()
    key: Facts | None = None
    dense: Facts | None = None
    if not known.all_true:
        key = None if mask.key is None else facts_of(mask.key)
        dense = None if mask.dense is None else facts_of(mask.dense)
    block, seqlens = _block_facts(mask)
    return MaskFacts(mask.pattern, _plain(key), _plain(dense), block, seqlens, known.live, known.prefix)


def _plain(facts: Facts | None) -> Facts | None:
    """Write symbolic sizes as UNKNOWN."""
    if facts is None or all_plain(facts.shape):
        return facts
    return facts._replace(shape=tuple(size if type(size) is int else UNKNOWN for size in facts.shape))


def _block_facts(mask: Mask) -> tuple[BlockSpec | None, tuple[int, int] | None]:
    block = mask.block
    if block is None:
        return None, None
    if isinstance(block, MaskFunction):
        return function_facts(block.per_batch, block.per_head, block.sizes)
    lengths = block.seq_lengths
    seqlens = (int(lengths[0]), int(lengths[1]))
    return (None if isinstance(block, MadeFor) else block_spec(block)), seqlens


def function_facts(
    per_batch: bool, per_head: bool, sizes: tuple[int | None, int | None, int | None]
) -> tuple[BlockSpec, tuple[int, int]]:
    """Return a mask function's spec, and the lengths that its tensors fix (UNKNOWN: any)."""
    batch, seqlen_q, seqlen_kv = (size if type(size) is int else UNKNOWN for size in sizes)
    return BlockSpec(max(batch, 1), 1, per_batch, per_head, is_function=True), (seqlen_q, seqlen_kv)
