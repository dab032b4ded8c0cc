"""A pattern said in another alignment allows exactly the same positions."""

from __future__ import annotations

import itertools

import pytest
import torch

from anyattn.backend.patterns import KernelPattern, in_alignment
from anyattn.masks.objects import Align
from anyattn.types.spec import UNKNOWN, PatternSpec

ALIGNS: tuple[Align, Align] = ("upper_left", "lower_right")


def _written(left: int, right: int, align: str, seqlen_q: int, seqlen_kv: int) -> torch.Tensor:
    row = torch.arange(seqlen_q)[:, None] + (seqlen_kv - seqlen_q if align == "lower_right" else 0)
    column = torch.arange(seqlen_kv)[None]
    allowed = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool)
    if left != -1:
        allowed &= column >= row - left
    if right != -1:
        allowed &= column <= row + right
    return allowed


def _as_told(found: KernelPattern, seqlen_q: int, seqlen_kv: int) -> torch.Tensor:
    first_row, end_row = found.rows or (0, seqlen_q)
    first_key, end_key = found.keys or (0, seqlen_kv)
    whole = torch.zeros(seqlen_q, seqlen_kv, dtype=torch.bool)
    inner = _written(found.left, found.right, found.align, end_row - first_row, end_key - first_key)
    whole[first_row:end_row, first_key:end_key] = inner
    return whole


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("target", ALIGNS)
def test_same_positions_in_every_alignment(align: Align, target: Align) -> None:
    said = 0
    sides = (-1, 0, 1, 3, 6)
    for seqlen_q, seqlen_kv in itertools.product((1, 2, 4, 5, 9), repeat=2):
        for left, right in itertools.product(sides, repeat=2):
            pattern = PatternSpec(left, right, align)
            found = in_alignment(pattern, seqlen_q, seqlen_kv, target, same_lengths=seqlen_q == seqlen_kv)
            if found is None:
                continue
            said += 1
            assert min(found.left, found.right) >= -1
            want = _written(left, right, align, seqlen_q, seqlen_kv)
            assert torch.equal(_as_told(found, seqlen_q, seqlen_kv), want), (pattern, seqlen_q, seqlen_kv, found)
    assert said > (600 if target == "lower_right" else 500)


def test_sides_that_cut_nothing_are_unbounded() -> None:
    found = in_alignment(PatternSpec(20, 20, "upper_left"), 8, 6, "lower_right", same_lengths=False)
    assert found is not None
    assert found.is_full


def test_unknown_lengths_are_only_said_in_their_own_alignment() -> None:
    causal = PatternSpec(-1, 0, "upper_left")
    assert in_alignment(causal, UNKNOWN, UNKNOWN, "lower_right", same_lengths=False) is None
    assert in_alignment(causal, UNKNOWN, 7, "upper_left", same_lengths=False) == KernelPattern(-1, 0, "upper_left")
    assert in_alignment(causal, UNKNOWN, UNKNOWN, "lower_right", same_lengths=True) is not None
