"""The biases of xformers 0.0.35 that aren't tensors, for its double.

Source: `xformers/ops/fmha/attn_bias.py`, `flash.py` (`_window_size`, `_is_causal`) and `common.py` of xformers 0.0.35.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class AttentionBias:
    """The base of masks that aren't tensors."""


class LowerTriangularMask(AttentionBias):
    """Causal, aligned to the upper left."""

    def __init__(self, device: torch.device | None = None) -> None:
        del device  # upstream ignores it too


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, aligned to the lower right."""


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window, aligned to the lower right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for side in ("window_left", "window_right"):
            if getattr(self, side) < 0:
                raise ValueError(
                    f"Invalid window value passed to `LocalAttentionFromBottomRightMask`: expected `{side}`"
                )


@dataclass
class _SeqLenInfo:
    """Where blocks begin: on the device, and on the host."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def intervals(self) -> Iterable[tuple[int, int]]:
        """Give each block's first token and end."""
        return itertools.pairwise(self.seqstart_py)

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | None = None) -> _SeqLenInfo:
        """Make it from lengths on the host."""
        assert not isinstance(seqlens, Tensor)
        lengths = list(seqlens)
        assert all(type(length) is int for length in lengths)
        starts = [0, *itertools.accumulate(lengths)]
        # Without a device upstream takes the current GPU, which needn't be the tensors' own: it never is here.
        place = torch.device("meta") if device is None else device
        seqstart = torch.tensor(starts, dtype=torch.int32, device=place)
        return cls(seqstart, max(lengths, default=-1), min(lengths, default=-1), starts)


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Each block of queries sees its own block of keys."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> BlockDiagonalMask:
        """Make it from the blocks' lengths."""
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen)
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or q_seqlen == kv_seqlen:
            return cls(q_seqinfo=q_seqinfo, k_seqinfo=q_seqinfo)
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=_SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Make each block causal, aligned to the upper left."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Make each block causal, aligned to the lower right."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """Make each block causal, and let a query see so many keys, its own position among them."""
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Blocks that are causal, aligned to the upper left."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Blocks that are causal, aligned to the lower right."""

    def __post_init__(self) -> None:
        for i, (rows, keys) in enumerate(zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)):
            num_queries, num_keys = rows[1] - rows[0], keys[1] - keys[0]
            if num_keys < num_queries:
                raise ValueError(
                    f"Block #{i} has num_keys={num_keys} and num_queries={num_queries}."
                    " Expected `num_keys >= num_queries`"
                )


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Blocks that are causal and windowed, aligned to the upper left."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        if self._window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={self._window_size}")
        for rows, keys in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True):
            if rows[1] - rows[0] - self._window_size >= keys[1] - keys[0]:
                raise RuntimeError("No keys are attended")


def sides_of(bias: AttentionBias | None) -> tuple[int, int]:
    """Give the sides that flash is told, -1 for unbounded."""
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        return bias.window_left, bias.window_right
    if isinstance(bias, BlockDiagonalCausalLocalAttentionMask):
        return bias._window_size - 1, 0
    if bias is None or type(bias) is BlockDiagonalMask:
        return -1, -1
    return -1, 0


def infinite(side: int, most: int) -> float:
    """Give a side as FlashAttention-2 takes it: unbounded from the number of keys on, wrong where S_q > S_kv."""
    return math.inf if side < 0 or side >= most else side
