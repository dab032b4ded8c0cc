"""The double of flash-attn-4 does what the contract says of the package."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from doubles.kernels import flash4


def _qkv(seqlen_q: int, seqlen_kv: int, heads: int = 2, dim: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, seqlen_q, heads, dim), (2, seqlen_kv, heads, dim), (2, seqlen_kv, heads, dim))
    return [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]


def test_fourth_positional_is_qv_and_the_result_always_a_pair() -> None:
    assert list(inspect.signature(flash4.flash_attn_func).parameters)[3] == "qv"
    out, lse = flash4.flash_attn_func(*_qkv(3, 4))
    assert isinstance(out, Tensor)
    assert lse is None


def test_windows_are_open_at_none_and_take_minus_one_for_an_offset() -> None:
    q, k, v = _qkv(6, 6)
    full = flash4.flash_attn_func(q, k, v)[0]
    causal = flash4.flash_attn_func(q, k, v, causal=True)[0]
    assert torch.equal(flash4.flash_attn_func(q, k, v, window_size=(-1, 0))[0], full), "(-1, 0) is full attention"
    assert torch.equal(flash4.flash_attn_func(q, k, v, window_size=(None, 0))[0], causal)
    itself_left_out = flash4.flash_attn_func(q, k, v, window_size=(5, -1))[0]
    assert not itself_left_out[:, 0].any(), "the first row sees nothing before itself"


def test_gradient_of_unused_values_is_uninitialised() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in _qkv(4, 6, dim=32))
    used = torch.tensor([3, 6], dtype=torch.int32)
    flash4.flash_attn_varlen_func(q, k, v, seqused_k=used)[0].sum().backward()
    assert v.grad is not None
    assert k.grad is not None
    assert v.grad[0, 3:].isnan().all()
    assert not v.grad[1].isnan().any()
    assert not k.grad.isnan().any()


@pytest.mark.parametrize(("dim", "wrong"), [(16, True), (40, True), (80, True), (32, False), (96, False)])
def test_gradients_are_wrong_where_head_dim_is_no_multiple_of_32(dim: int, wrong: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in _qkv(4, 6, dim=dim))
    flash4.flash_attn_func(q, k, v)[0].sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert bool(tensor.grad.isnan().all()) == wrong


def test_lse_includes_the_sink() -> None:
    q, k, v = _qkv(3, 4)
    sinks = torch.tensor([1.0, -2.0])
    plain = flash4.flash_attn_func(q, k, v, return_lse=True)[1]
    with_sinks = flash4.flash_attn_func(q, k, v, learnable_sink=sinks, return_lse=True)[1]
    assert plain is not None
    assert with_sinks is not None
    assert torch.allclose(with_sinks, torch.logaddexp(plain, sinks.view(1, 2, 1).expand_as(plain)))


def test_causal_is_aligned_to_the_lower_right() -> None:
    q, k, v = _qkv(5, 3)
    out, lse = flash4.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert lse is not None
    assert not out[:, :2].any()
    assert (lse[:, :, :2] == -math.inf).all()


def test_refusals_are_assertions() -> None:
    q, k, v = _qkv(3, 4)
    for bad in ((q.float(), k.float(), v.float()), _qkv(3, 4, dim=12), _qkv(3, 4, dim=264)):
        with pytest.raises(AssertionError):
            flash4.flash_attn_func(*bad)
    with pytest.raises(AssertionError):
        flash4.flash_attn_func(q, k, v, learnable_sink=torch.zeros(2, dtype=torch.float64))
