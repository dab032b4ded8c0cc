"""Recognise the mask functions that Transformers makes: causal, windows, chunks, packed sequences."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as stock

_ONE = torch.zeros(1, 1, dtype=torch.int64)
_AND = stock.and_masks(stock.causal_mask_function).__code__
_WINDOW = stock.sliding_window_overlay(1).__code__
_AROUND = stock.sliding_window_bidirectional_overlay(1).__code__
_CHUNK = stock.chunked_overlay(1, _ONE[0]).__code__
_PACKED = stock.packed_sequence_mask_function(_ONE).__code__
_REMAPPED = stock.remap_positions_for_packed_sequence(stock.causal_mask_function, _ONE).__code__


@dataclass(frozen=True, slots=True)
class Found:
    """What a mask function allows, counted in positions of the sequence.

    Attributes:
        left: How many keys before its own position a row sees; -1 is all.
        right: How many after it; -1 is all.
        chunk: The length of the chunks that a row doesn't see beyond; 0 for none.
        documents: `(B, S)`, which of the packed sequences a token belongs to; None for none.
    """

    left: int = -1
    right: int = -1
    chunk: int = 0
    documents: Tensor | None = None

    def within(self, kv_length: int, kv_offset: Any) -> Found:
        """Return the same without chunks, if all keys are in the first chunk."""
        first = type(kv_offset) is int and kv_offset == 0 and kv_length <= self.chunk
        return replace(self, chunk=0) if first else self

    def allows_all(self, kv_length: int) -> bool:
        """Whether each row sees every key, if a layer counts a window of w as w keys and if it counts w - 1."""
        if self.chunk or self.documents is not None or self.left != self.right:
            return False
        return self.left < 0 or kv_length < self.left

    def __and__(self, other: Found) -> Found:
        return Found(
            _narrower(self.left, other.left),
            _narrower(self.right, other.right),
            self.chunk or other.chunk,
            self.documents if other.documents is None else other.documents,
        )


def _narrower(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)


def recognise(function: Callable[..., Any]) -> Found | None:
    """Return what one of Transformers' own mask functions allows; None for any other function.

    While torch.compile traces, only the two plain ones are recognised: it traces no closures.
    """
    if function is stock.causal_mask_function:
        return Found(right=0)
    if function is stock.bidirectional_mask_function:
        return Found()
    if torch.compiler.is_compiling() or not isinstance(function, types.FunctionType):
        return None
    code = function.__code__
    if code is _AND:
        return _joined(_captured(function)["mask_functions"])
    if code is _WINDOW:
        return Found(left=_captured(function)["sliding_window"] - 1)
    if code is _AROUND:
        size = _captured(function)["sliding_window"]
        return Found(left=size, right=size)
    if code is _CHUNK:
        return Found(chunk=_captured(function)["chunk_size"])
    if code is _PACKED:
        return Found(documents=_captured(function)["packed_sequence_mask"])
    if code is _REMAPPED:
        # Inside a packed sequence positions and places differ by a constant, which no causal mask or window sees.
        inner = recognise(_captured(function)["mask_function"])
        return None if inner is None or inner.chunk or inner.documents is not None else inner
    return None


def _joined(functions: tuple[Callable[..., Any], ...]) -> Found | None:
    joined = Found()
    for function in functions:
        found = recognise(function)
        if found is None:
            return None
        twice = (found.chunk and joined.chunk) or (found.documents is not None and joined.documents is not None)
        if twice:
            return None
        joined = joined & found
    return joined


def _captured(function: types.FunctionType) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
