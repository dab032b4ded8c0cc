"""What a right call gives, through the public functions, against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anyattn
from anyattn import masks, reference
from anyattn.masks.objects import Mask

BACKENDS = ("native", "native_flash", "native_math", "flex")


def tensors(
    batch: int = 2,
    seqlen_q: int = 9,
    seqlen_kv: int = 12,
    heads: int = 4,
    kv_heads: int = 4,
    dim: int = 16,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(batch, seqlen_q, heads, dim, **options)
    k = torch.randn(batch, seqlen_kv, kv_heads, dim, **options)
    v = torch.randn(batch, seqlen_kv, kv_heads, dim, **options)
    return q, k, v


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask | None = None, **options: Any) -> torch.Tensor:
    return reference.attention(q, k, v, mask, **options)[0].to(q.dtype)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tol: float = 5e-6) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() < tol


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(5, 9), (9, 5), (1, 7), (7, 7)])
def test_causal_alignments_differ_only_where_lengths_do(
    backend: str, align: Any, seqlen_q: int, seqlen_kv: int
) -> None:
    q, k, v = tensors(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    mask = masks.Causal(align)
    assert_close(anyattn.attention(q, k, v, mask, backend=backend), truth(q, k, v, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_causal_means_upper_left(backend: str) -> None:
    q, k, v = tensors()
    assert_close(anyattn.attention(q, k, v, is_causal=True, backend=backend), truth(q, k, v, masks.Causal()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(2, 1), (0, 0), (-1, 3), (4, -1), (2, 0)])
def test_window_argument_equals_window_mask(backend: str, window: tuple[int, int]) -> None:
    q, k, v = tensors()
    mask = masks.SlidingWindow(*window)
    assert_close(anyattn.attention(q, k, v, window=window, backend=backend), truth(q, k, v, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_is_aligned_like_the_causal_mask_in_force(backend: str) -> None:
    q, k, v = tensors()
    found = anyattn.attention(q, k, v, masks.Causal("lower_right"), window=(3, -1), backend=backend)
    assert_close(found, truth(q, k, v, masks.SlidingWindow(3, 0, "lower_right")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_is_causal_are_joined(backend: str) -> None:
    q, k, v = tensors()
    dense = torch.rand(2, 1, 9, 12) > 0.3
    found = anyattn.attention(q, k, v, dense, is_causal=True, backend=backend)
    assert_close(found, truth(q, k, v, masks.Boolean(dense) & masks.Causal()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-3, 3.0])
def test_scale_of_any_sign_is_right(backend: str, scale: float) -> None:
    q, k, v = tensors()
    assert_close(anyattn.attention(q, k, v, scale=scale, backend=backend), truth(q, k, v, scale=scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12,), (9, 12), (1, 12), (4, 9, 12), (2, 1, 1, 12), (1, 4, 9, 1), (2, 4, 9, 12)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_tensor_broadcasts_as_in_sdpa(backend: str, shape: tuple[int, ...], kind: str) -> None:
    q, k, v = tensors()
    dense = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape)
    assert_close(anyattn.attention(q, k, v, dense, backend=backend), truth(q, k, v, Mask(dense=dense)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_rows_give_zeros_and_minus_infinity(backend: str) -> None:
    q, k, v = tensors()
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1] = False
    found = anyattn.attention(q, k, v, masks.KeyPadding(padding), backend=backend)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    if backend != "native_math":
        _, lse = anyattn.attention(q, k, v, masks.KeyPadding(padding), backend=backend, return_lse=True)
        assert torch.isneginf(lse[1]).all()
        assert torch.isfinite(lse[0]).all()


@pytest.mark.parametrize("backend", ["native", "native_flash", "flex"])
def test_lse_is_natural_float32_detached(backend: str) -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    out, lse = anyattn.attention(q, k, v, return_lse=True, backend=backend)
    wanted = reference.attention(q, k, v)[1]
    assert lse.shape == (2, 4, 9)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert out.dtype == torch.bfloat16
    assert_close(lse.double(), wanted, 2e-2)


@pytest.mark.parametrize("backend", ["native", "native_flash", "flex"])
def test_sinks_are_in_the_denominator(backend: str) -> None:
    q, k, v = tensors()
    sinks = torch.randn(4)
    wanted, wanted_lse = reference.attention(q, k, v, sinks=sinks)
    out, lse = anyattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    assert_close(out.double(), wanted)
    assert_close(lse.double(), wanted_lse)
    assert_close(anyattn.attention(q, k, v, sinks=sinks, backend=backend).double(), wanted)


def test_sinks_with_gradients_are_refused_not_dropped() -> None:
    q, k, v = tensors(requires_grad=True)
    with pytest.raises(anyattn.UnsupportedCallError, match="sinks without gradients"):
        anyattn.attention(q, k, v, sinks=torch.randn(4))


def test_softcap_runs_on_flex_and_is_refused_elsewhere() -> None:
    q, k, v = tensors()
    assert_close(anyattn.attention(q, k, v, softcap=1.5, backend="flex"), truth(q, k, v, softcap=1.5))
    with pytest.raises(anyattn.UnsupportedCallError, match="softcap"):
        anyattn.attention(q, k, v, softcap=1.5, backend="native")
    assert_close(anyattn.attention(q, k, v, softcap=1.5, backend="auto"), truth(q, k, v, softcap=1.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gqa_groups_consecutive_heads(backend: str) -> None:
    q, k, v = tensors(heads=6, kv_heads=2)
    assert_close(anyattn.attention(q, k, v, enable_gqa=True, backend=backend), truth(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_calls_have_the_reference_result(backend: str, sizes: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_kv = sizes
    q, k, v = tensors(batch, seqlen_q, seqlen_kv, requires_grad=backend != "flex")
    out = anyattn.attention(q, k, v, backend=backend)
    assert out.shape == (batch, seqlen_q, 4, 16)
    assert not out.any()
    if out.requires_grad:
        out.sum().backward()
        assert q.grad is not None
        assert not q.grad.any()


def test_empty_keys_give_minus_infinity_lse() -> None:
    q, k, v = tensors(seqlen_kv=0)
    _, lse = anyattn.attention(q, k, v, return_lse=True)
    assert lse.shape == (2, 4, 9)
    assert torch.isneginf(lse).all()


def test_drop_in_agrees_with_torch_in_its_layout() -> None:
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors())
    mask = torch.rand(9, 12) > 0.3
    found = anyattn.scaled_dot_product_attention(q, k, v, mask, 0.0, False, 0.3)
    assert_close(found, F.scaled_dot_product_attention(q, k, v, mask, scale=0.3))


def test_drop_in_takes_torchs_positional_arguments() -> None:
    import inspect

    names = list(inspect.signature(anyattn.scaled_dot_product_attention).parameters)
    assert names[:8] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


@pytest.mark.parametrize("backend", ["native", "native_math"])
def test_dropout_of_one_gives_zeros(backend: str) -> None:
    q, k, v = tensors()
    assert not anyattn.attention(q, k, v, dropout_p=1.0, backend=backend).any()


def test_dropout_keeps_exact_weights_over_one_minus_p() -> None:
    q, k = torch.randn(1, 64, 1, 16), torch.randn(1, 64, 1, 16)
    v = torch.eye(64)[None, :, None, :]
    out = anyattn.attention(q, k, v, dropout_p=0.25)[0, :, 0]
    weights = torch.softmax(q[0, :, 0] @ k[0, :, 0].T / 4, -1)
    kept = out != 0
    assert_close(out[kept], weights[kept] / 0.75)
    assert abs(kept.float().mean().item() - 0.75) < 0.03


@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math"])
def test_gradients_equal_the_references(backend: str) -> None:
    q, k, v = tensors(heads=4, kv_heads=2, requires_grad=True)
    padding = torch.rand(2, 12) > 0.3
    mask = masks.KeyPadding(padding) & masks.Causal("lower_right")
    out = anyattn.attention(q, k, v, mask, enable_gqa=True, backend=backend)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((reference.attention(q, k, v, mask)[0] * weight).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other.float(), 2e-5)


def test_bias_gradient_is_given_or_refused() -> None:
    q, k, v = tensors()
    bias = torch.randn(1, 4, 9, 12, requires_grad=True)
    found = torch.autograd.grad(anyattn.attention(q, k, v, bias).sum(), bias)[0]
    wanted = torch.autograd.grad(reference.attention(q, k, v, masks.Bias(bias))[0].sum(), bias)[0]
    assert_close(found, wanted.float())
    for backend in ("native_flash", "flex"):
        with pytest.raises(anyattn.UnsupportedCallError, match="gradient"):
            anyattn.attention(q, k, v, bias, backend=backend)


def test_forward_only_backend_refuses_gradients_before_it_runs() -> None:
    q, k, v = tensors(requires_grad=True)
    with pytest.raises(anyattn.UnsupportedCallError, match="no gradients"):
        anyattn.attention(q, k, v, backend="flex")
    with torch.no_grad():
        assert_close(anyattn.attention(q, k, v, backend="flex"), truth(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_packed_inputs_are_right(backend: str) -> None:
    packed = torch.randn(2, 9, 3, 4, 16)
    q, k, v = packed.unbind(2)
    assert_close(anyattn.attention(q, k, v, backend=backend), truth(q, k, v))
    k, v = (torch.randn(2, 9, 1, 16).expand(2, 9, 4, 16) for _ in range(2))
    assert_close(anyattn.attention(q, k, v, backend=backend), truth(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_head_dim_is_right_after_a_contiguous_call(backend: str) -> None:
    q, k, v = tensors()
    anyattn.attention(q, k, v, backend=backend)  # decides the call for these shapes
    wanted = truth(q, k, v)
    q, k, v = (tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in (q, k, v))
    assert q.stride(-1) != 1
    assert_close(anyattn.attention(q, k, v, backend=backend), wanted)


def test_meta_tensors_give_shapes_and_their_strides_are_part_of_the_decision() -> None:
    q, k, v = tensors(device="meta")
    for query in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q):
        with anyattn.record() as calls:
            out = anyattn.attention(query, k, v, is_causal=True)
        assert out.shape == q.shape
        assert out.device.type == "meta"
        assert calls[0].spec.storage.bhsd_contiguous is False
    assert len(anyattn.scopes.defaults.current.get().short) == 2


def test_causal_bias_of_torch_is_a_pattern_with_its_lengths_checked() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = tensors()
    assert_close(anyattn.attention(q, k, v, causal_lower_right(9, 12)), truth(q, k, v, masks.Causal("lower_right")))
    assert_close(anyattn.attention(q, k, v, causal_upper_left(9, 12)), truth(q, k, v, masks.Causal()))
    with pytest.raises(anyattn.InvalidCallError, match="lengths"):
        anyattn.attention(q, k, v, causal_lower_right(4, 4))


def test_autocast_computes_in_its_dtype_and_keeps_the_masks_precision() -> None:
    q, k, v = tensors()
    bias = torch.randn(9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        plain = anyattn.attention(q, k, v)
        masked = anyattn.attention(q, k, v, bias)
    assert plain.dtype == masked.dtype == torch.bfloat16
    assert_close(plain.float(), truth(q, k, v), 2e-2)
    assert_close(masked.float(), truth(q, k, v, masks.Bias(bias)), 2e-2)
    assert anyattn.attention(q, k, v).dtype == torch.float32


def test_finfo_min_is_a_number_and_minus_infinity_a_refusal() -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    low = torch.full((9, 12), torch.finfo(torch.float32).min)
    out = anyattn.attention(q, k, v, low)
    assert_close(out.float(), v.float().mean(1, keepdim=True).expand_as(out), 2e-2)
    assert not anyattn.attention(q, k, v, torch.full((9, 12), -math.inf)).any()
