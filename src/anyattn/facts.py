"""What is known of a call without reading a value: facts of its tensors and mask, and its other arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyattn import scalars
from anyattn.masks import Pattern
from anyattn.spec import (
    UNKNOWN,
    BlockSpec,
    Layout,
)
from anyattn.tracing import needs_gradient, static_shape

Lengths = tuple[Tensor, Tensor, int, int]
"""Of a packed call: both sides' cumulative lengths, int32 `(B + 1,)`, and both sides' largest length."""


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
        live: Whether they are known to leave every row a key.
        prefix: Whether a key mask's keys are known to be the first ones of each batch entry.
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
    """Write numbers and flags of any kind as Python's own.

    Raises:
        InvalidCallError: For a tensor whose value can't be read.
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
    """Read the facts of a tensor; its sizes are symbols where they are being traced."""
    return Facts(static_shape(tensor), tensor.dtype, tensor.device, needs_gradient(tensor))


def agree(first: int, second: int) -> bool:
    """Whether two sizes may be the same: one that isn't known agrees with every other."""
    return first == second or UNKNOWN in (first, second)


def shape_text(facts: Facts) -> str:
    """Write a shape for a message; `?` is a size that isn't known."""
    return "(" + ", ".join("?" if size == UNKNOWN else str(size) for size in facts.shape) + ")"
