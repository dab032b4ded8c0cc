"""Arguments that Diffusers' dispatcher loses or turns into something else without a word, on every CPU backend.

Each comment says what its dispatcher does. Every test runs through a call of anyattn and through the integration.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doors_to_backends import BACKENDS, Attend, assert_right, differ, padding, tensors, triangle, truth

import anyattn
from anyattn import masks
from anyattn.selection import registry

HONOUR_DROPOUT = ("native", "native_math")
GIVE_GRADIENTS = ("native", "native_flash", "native_math")


def test_every_exact_backend_of_the_cpu_is_tested_here() -> None:
    built = {name: backend for name, backend in registry.known(registry.names()) if backend is not None}
    on_cpu = {name: backend.declarations.get("cpu") for name, backend in built.items()}
    assert {name for name, caps in on_cpu.items() if caps is not None and caps.exact} == set(BACKENDS)


# Its flex looks for a mask before it looks at is_causal, so that causal alone is full attention.
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(8, 8), (5, 9), (9, 5)])
def test_is_causal_is_honoured_without_a_mask(attend: Attend, seqlen_q: int, seqlen_kv: int) -> None:
    q, k, v = tensors(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    assert_right(attend(q, k, v, is_causal=True), truth(q, k, v, triangle(seqlen_q, seqlen_kv)))


# Its flex and xformers drop the mask as soon as is_causal is there too.
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_tensor_and_is_causal_are_both_honoured(attend: Attend, kind: str) -> None:
    q, k, v = tensors()
    mask = torch.rand(2, 1, 6, 9) > 0.3 if kind == "bool" else torch.randn(2, 1, 6, 9)
    causal = triangle(6, 9)
    wanted = truth(q, k, v, causal & mask) if kind == "bool" else truth(q, k, v, causal, bias=mask)
    assert differ(wanted, truth(q, k, v, causal))
    assert_right(attend(q, k, v, mask, is_causal=True), wanted)


# Its flex drops is_causal beside a BlockMask.
def test_block_mask_and_is_causal_are_both_honoured_or_refused(attend: Attend, backend: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = tensors()
    block = create_block_mask(lambda b, h, i, j: (i + j) % 3 != 1, None, None, 6, 9, device="cpu")
    if backend != "flex":
        with pytest.raises(anyattn.UnsupportedCallError, match="block"):
            attend(q, k, v, block, is_causal=True)
        return
    allowed = (torch.arange(6)[:, None] + torch.arange(9)) % 3 != 1
    assert_right(attend(q, k, v, block, is_causal=True), truth(q, k, v, allowed & triangle(6, 9)))


# Its flex and xformers add a tokenizer's 0/1 mask to the scores.
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(2, 9), (2, 1, 1, 9), (6, 9)])
def test_integer_mask_is_refused_with_the_cure(attend: Attend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = tensors()
    with pytest.raises(anyattn.InvalidCallError, match=r"bool\(\)"):
        attend(q, k, v, torch.ones(shape, dtype=dtype))


# Eleven of its backends have no dropout_p, and run without it.
def test_dropout_is_honoured_or_refused(attend: Attend, backend: str) -> None:
    q, k, v = tensors()
    if backend not in HONOUR_DROPOUT:
        with pytest.raises(anyattn.UnsupportedCallError, match="dropout"):
            attend(q, k, v, dropout_p=0.5)
        return
    assert differ(attend(q, k, v, dropout_p=0.5).double(), truth(q, k, v))
    assert not attend(q, k, v, dropout_p=1.0).any()


# Its context-parallel backward runs attention again and draws other weights to drop than forward did.
@pytest.mark.parametrize("backend", HONOUR_DROPOUT)
def test_backward_drops_the_weights_that_forward_dropped(attend: Attend) -> None:
    q, k, v = tensors(seqlen_q=32, seqlen_kv=32)
    v.requires_grad_()
    out = attend(q, k, v, dropout_p=0.5)
    weight = torch.randn_like(out)
    gradient = torch.autograd.grad((out * weight).sum(), v)[0]
    # The output is linear in v, so that its gradient gives it back where the same weights were dropped.
    assert torch.allclose((gradient * v).sum(), (out * weight).sum(), rtol=1e-4, atol=1e-3)


def _shaped(kind: str) -> torch.Tensor:
    allowed = torch.rand(2, 4, 6, 9) > 0.4
    allowed[..., 0] = True
    if kind == "rows":
        return allowed[:, :1]
    if kind == "heads":
        return allowed[:1]
    if kind == "keys of each head":
        return allowed[:, :, :1]
    if kind == "a row without a key":
        allowed[1, :, 2] = False
    if kind == "a window":
        rows, columns = torch.arange(6)[:, None], torch.arange(9)
        return ((columns >= rows - 1) & (columns <= rows + 2))[None, None]
    return allowed


# Its packing backends take a key for allowed where any row of any head may see it: these become full attention.
@pytest.mark.parametrize("kind", ["rows", "heads", "keys of each head", "a row without a key", "a window"])
def test_mask_of_rows_and_heads_is_never_reduced_to_one_of_keys(attend: Attend, kind: str) -> None:
    q, k, v = tensors()
    mask = _shaped(kind)
    wanted = truth(q, k, v, mask)
    assert differ(wanted, truth(q, k, v, mask.any(-2, keepdim=True).any(-3, keepdim=True)))
    assert_right(attend(q, k, v, mask), wanted)


# Its xformers turns a boolean mask into the query's dtype and adds it: +1 where allowed, 0 where forbidden.
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("seqlen_kv", [9, 16])
def test_boolean_mask_is_never_taken_for_numbers(
    attend: Attend, seqlen_kv: int, dtype: torch.dtype, tol: float
) -> None:
    q, k, v = tensors(seqlen_kv=seqlen_kv, dtype=dtype)
    mask = torch.rand(2, 1, 6, seqlen_kv) > 0.4
    wanted = truth(q, k, v, mask)
    assert differ(wanted, truth(q, k, v, bias=mask))
    assert_right(attend(q, k, v, mask), wanted, tol)


# Its NPU path turns a mask of numbers into bool and inverts it: it keeps exactly the padding.
def test_additive_mask_keeps_its_sign(attend: Attend) -> None:
    q, k, v = tensors()
    keep = padding(2, 9, "right")[:, None, None]
    additive = torch.zeros(2, 1, 1, 9).masked_fill(~keep, -1e4)
    assert_right(attend(q, k, v, additive), truth(q, k, v, keep))
    additive = additive.masked_fill(~keep, float("-inf"))
    assert_right(attend(q, k, v, additive), truth(q, k, v, keep))


# There, an additive mask of zeros forbids everything.
def test_additive_mask_of_zeros_changes_nothing(attend: Attend) -> None:
    q, k, v = tensors()
    assert_right(attend(q, k, v, torch.zeros(2, 1, 1, 9)), truth(q, k, v))


# Its XLA path has no scale, and takes 1 / sqrt(D) whatever is asked for.
@pytest.mark.parametrize("scale", [0.1, 1.0, -0.5, 0.0])
def test_scale_is_honoured(attend: Attend, scale: float) -> None:
    q, k, v = tensors()
    assert_right(attend(q, k, v, scale=scale), truth(q, k, v, scale=scale))


# Ten of its backends align causal at the end where torch aligns it at the beginning, and none says so.
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(5, 9), (9, 5), (1, 9), (9, 1)])
def test_causal_has_one_meaning_where_lengths_differ(attend: Attend, seqlen_q: int, seqlen_kv: int) -> None:
    q, k, v = tensors(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    upper = truth(q, k, v, triangle(seqlen_q, seqlen_kv))
    lower = truth(q, k, v, triangle(seqlen_q, seqlen_kv, seqlen_kv - seqlen_q))
    assert differ(upper, lower)
    assert_right(attend(q, k, v, is_causal=True), upper)
    assert_right(attend(q, k, v, masks.Causal("upper_left")), upper)
    assert_right(attend(q, k, v, masks.Causal("lower_right")), lower)


# Its packing backends align causal to the length that is left once the padding is out.
@pytest.mark.parametrize("where", ["right", "left", "hole"])
@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
def test_causal_beside_padding_is_aligned_to_the_whole_length(attend: Attend, align: Any, where: str) -> None:
    q, k, v = tensors(seqlen_q=7)
    keep = padding(2, 9, where)
    causal = triangle(7, 9, 2 if align == "lower_right" else 0)
    mask = masks.KeyPadding(keep) & masks.Causal(align)
    assert_right(attend(q, k, v, mask), truth(q, k, v, causal & keep[:, None, None]))


# Its backends give no log-sum-exp, None, another layout, or a crash; with B=2 `out, lse =` unpacks the batch.
def test_lse_has_one_layout(attend: Attend) -> None:
    q, k, v = tensors()
    result = attend(q, k, v, return_lse=True)
    assert isinstance(result, tuple)
    out, lse = result
    assert_right(out, truth(q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    assert lse.dtype == torch.float32
    assert_right(lse, scores.logsumexp(-1))


# Its forward-only kernels give an output without a gradient, and training goes on without this layer.
def test_output_has_right_gradients_or_the_call_is_refused(attend: Attend, backend: str) -> None:
    inputs = tensors(requires_grad=True)
    if backend not in GIVE_GRADIENTS:
        with pytest.raises(anyattn.UnsupportedCallError, match="gradients"):
            attend(*inputs, is_causal=True)
        return
    found = torch.autograd.grad(attend(*inputs, is_causal=True).square().sum(), inputs)
    wanted = torch.autograd.grad(truth(*inputs, triangle(6, 9)).square().sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        assert_right(one, other.double(), 5e-5)


# It caches the lengths of packed sequences for the process: made under inference_mode they break the next backward.
@pytest.mark.parametrize("kept", [True, False], ids=["the same mask", "a new mask"])
def test_validation_in_inference_mode_spoils_no_training_step(attend: Attend, backend: str, kept: bool) -> None:
    keep = padding(2, 9, "hole")
    mask = masks.KeyPadding(keep)
    inputs = tensors()
    wanted = truth(*inputs, keep[:, None, None])
    with torch.inference_mode():
        assert_right(attend(*inputs, mask), wanted)
    mask = mask if kept else masks.KeyPadding(keep.clone())
    if backend in GIVE_GRADIENTS:
        for tensor in inputs:
            tensor.requires_grad_()
    out = attend(*inputs, mask)
    assert_right(out, wanted)
    if backend in GIVE_GRADIENTS:
        out.sum().backward()
        assert inputs[0].grad is not None
