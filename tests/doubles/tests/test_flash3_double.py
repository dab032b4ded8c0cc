"""The doubles of FlashAttention-3 do what the contract says of its builds."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from doubles.kernels import flash3


def _qkv(seqlen_q: int, seqlen_kv: int, heads: int = 2, kv_heads: int = 2, dim: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, seqlen_q, heads, dim), (2, seqlen_kv, kv_heads, dim), (2, seqlen_kv, kv_heads, dim))
    return [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]


def test_fourth_positional_is_the_scale_and_there_is_no_dropout() -> None:
    names = list(inspect.signature(flash3.flash_attn_func).parameters)
    assert names[3] == "softmax_scale"
    assert "dropout_p" not in names
    assert list(inspect.signature(flash3.flash_attn_varlen_func).parameters)[7:9] == ["seqused_q", "seqused_k"]


def test_causal_is_aligned_to_the_lower_right_and_dead_rows_have_minus_infinity() -> None:
    q, k, v = _qkv(5, 3)
    out, lse = flash3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :2].any()
    assert (lse[:, :, :2] == -math.inf).all()
    assert torch.equal(out[:, 2], v[:, 0])


def test_right_window_of_the_key_length_still_cuts() -> None:
    q, k, v = _qkv(9, 3)
    assert not torch.equal(flash3.flash_attn_func(q, k, v, window_size=(-1, 3)), flash3.flash_attn_func(q, k, v))


def test_used_keys_set_the_alignment_and_no_length_gives_zeros() -> None:
    q, k, v = _qkv(4, 6)
    used = torch.tensor([3, 0], dtype=torch.int32)
    out, lse = flash3.flash_attn_varlen_func(
        q, k, v, None, None, 4, 6, seqused_k=used, causal=True, return_attn_probs=True
    )
    first = flash3.flash_attn_func(q[:1], k[:1, :3], v[:1, :3], causal=True)
    assert torch.equal(out[:1], first)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()


def test_fp8_is_scaled_by_entry_and_key_head_and_gives_bf16() -> None:
    q, k, v = _qkv(3, 4, heads=4)
    by = torch.tensor([[2.0, 0.5], [1.0, 3.0]])
    e4m3 = [tensor.to(torch.float8_e4m3fn) for tensor in (q, k, v)]
    out = flash3.flash_attn_func(*e4m3, v_descale=by)
    plain = flash3.flash_attn_func(*e4m3)
    assert out.dtype == torch.bfloat16
    ratio = by.repeat_interleave(2, 1)[:, None, :, None]
    assert torch.allclose(out.float(), plain.float() * ratio, rtol=1e-2, atol=1e-3)


def test_builds_tell_lse_by_a_flag_always_or_never() -> None:
    q, k, v = _qkv(3, 4)
    always = flash3.ALWAYS_LSE.modules()["flash_attn_interface"].flash_attn_func
    never = flash3.NEVER_LSE.modules()["flash_attn_interface"].flash_attn_func
    for function in (always, never):
        assert "return_attn_probs" not in inspect.signature(function).parameters
        with pytest.raises(TypeError, match="return_attn_probs"):
            function(q, k, v, return_attn_probs=True)
    assert isinstance(always(q, k, v), tuple)
    assert isinstance(never(q, k, v), Tensor)


def test_fa3_fwd_has_no_fp16_no_window_and_no_backward() -> None:
    function = flash3.FORWARD.modules()["fa3_fwd_interface"].flash_attn_func
    q, k, v = (tensor.requires_grad_() for tensor in _qkv(3, 4))
    assert not function(q, k, v).requires_grad
    with pytest.raises(RuntimeError, match="local"):
        function(q, k, v, window_size=(2, 0))
    with pytest.raises(RuntimeError, match="fp16"):
        function(q.half(), k.half(), v.half())


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_is_not_positive_gives_nan(scale: float) -> None:
    assert flash3.flash_attn_func(*_qkv(3, 4), softmax_scale=scale).isnan().all()
