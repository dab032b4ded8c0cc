"""The double of AITER does what the contract says of the kernel."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from doubles.kernels.aiter import flash_attn_func, flash_attn_varlen_func


def _qkv(rows: int, keys: int, dim: int = 16, dim_v: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, rows, 2, dim), (2, keys, 2, dim), (2, keys, 2, dim_v))
    return tuple(torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)


def test_signatures_are_upstreams() -> None:
    dense = inspect.signature(flash_attn_func).parameters
    assert list(dense)[3:12] == [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "bias",
        "alibi_slopes",
        "deterministic",
        "return_lse",
        "return_attn_probs",
    ]
    assert dense["window_size"].default == (-1, -1, 0)
    assert "softcap" not in dense
    packed = list(inspect.signature(flash_attn_varlen_func).parameters)
    assert packed[7:11] == ["min_seqlen_q", "dropout_p", "softmax_scale", "logits_soft_cap"]


def test_causal_is_aligned_to_the_lower_right_and_dead_rows_have_lse_infinity() -> None:
    q, k, v = _qkv(5, 3)
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert not out[:, :2].any()
    assert bool((lse[:, :, :2] == math.inf).all())
    assert torch.equal(out[:, 2], v[:, 0])


@pytest.mark.parametrize("window", [(-1, 0, 0), (0, 0, 0), (0, -1, 0), (5, 0, 0)])
def test_window_without_a_side_above_zero_is_none(window: tuple[int, ...]) -> None:
    q, k, v = _qkv(5, 5)
    assert torch.equal(flash_attn_func(q, k, v, window_size=window), flash_attn_func(q, k, v))


def test_right_side_of_the_key_length_is_taken_for_unbounded() -> None:
    q, k, v = _qkv(9, 3)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(-1, 3, 0)), flash_attn_func(q, k, v))
    assert not torch.equal(flash_attn_func(q, k, v, window_size=(-1, 2, 0)), flash_attn_func(q, k, v))


def test_gradients_need_lse_asked_for() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(3, 3))
    with pytest.raises(AssertionError):
        flash_attn_func(q, k, v)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_attn_probs_alone_are_not_lse() -> None:
    result = flash_attn_func(*_qkv(3, 3), return_attn_probs=True)
    assert len(result) == 2
    assert result[1].numel() == 0


def test_backward_of_causal_with_unequal_lengths_is_wrong() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(2, 3))
    out, _ = flash_attn_func(q, k, v, causal=True, return_lse=True)
    flow = torch.zeros_like(out)
    flow[:, 0] = 1.0
    out.backward(flow)
    assert v.grad is not None
    assert bool(v.grad[:, 2].any()), "a key that the first query doesn't see"


def test_packed_sequence_without_keys_leaves_rubbish() -> None:
    q, k, v = (t[0].requires_grad_() for t in _qkv(4, 3))
    starts, ends = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 0, 3], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, starts, ends, 2, 3, return_lse=True)
    assert bool(out[:2].isnan().all())
    assert lse.shape == (2, 4)
    out[2:].sum().backward()
    assert q.grad is not None
    assert bool(q.grad[:2].isnan().all())


def test_value_may_have_another_head_dim() -> None:
    assert flash_attn_func(*_qkv(3, 3, 16, 24)).shape[-1] == 24
