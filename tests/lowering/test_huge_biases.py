"""FlexAttention on CUDA beside huge biases: what inductor's kernels do with scores, in the arithmetic that they have.

A double proves the function of scores that the adapter makes, never the kernel.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anyattn import reference
from anyattn.adapters.flex.huge import FROM, compressed, lse_with_bias
from anyattn.adapters.flex.mods import score_mod_of
from anyattn.backend.protocol import Parts
from anyattn.masks.objects import Bias
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec

LOG2_E = torch.tensor(1.44269504)
QUERIES, KEYS, HEADS = 40, 48, 2


def as_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, plainly: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute attention (B, S, H, D) as the template does: products with log2(e) minus the rounded largest, fused.

    `plainly` adds the bias to the scores as it is, in place of the adapter's function.
    """
    full = (query.shape[0], HEADS, QUERIES, KEYS)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * 0.25
    if plainly:
        scores = scores + bias.float()
    else:
        score_mod = score_mod_of(spec_of(query.dtype, bias), Parts(dense=bias), None)
        assert score_mod is not None
        indices = [
            torch.arange(size).view([-1 if at == axis else 1 for at in range(4)]) for axis, size in enumerate(full)
        ]
        scores = score_mod(scores, *(index.expand(full) for index in indices))
    top = (scores * LOG2_E).amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    # Doubles hold the product of two float32 numbers whole, as a fused step does.
    weights = torch.exp2((scores.double() * LOG2_E.double() - top.double()).float())
    total = weights.sum(-1, keepdim=True)
    held = weights.to(query.dtype).float()
    out = held @ value.float() / torch.where(total == 0, 1.0, total)
    lse = (top + torch.log2(total)).squeeze(-1) * math.log(2)
    return out.to(query.dtype).transpose(1, 2), lse_with_bias(lse, bias)


def spec_of(dtype: torch.dtype, bias: Tensor) -> AttentionSpec:
    shape = (bias.shape[0], bias.shape[1], bias.shape[2], bias.shape[3])
    return AttentionSpec(
        batch=2,
        seqlen_q=QUERIES,
        seqlen_kv=KEYS,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=16,
        head_dim_v=16,
        dtype=dtype,
        device_type="cuda",
        scale=0.25,
        mask=MaskSpec(dense=DenseSpec("bias", bias.dtype, shape), dead_rows=True),
    )


def row_of(low: float, dtype: torch.dtype) -> Tensor:
    bias = torch.randn(1, 1, QUERIES, KEYS).to(dtype)
    bias[..., 5, :] = low
    bias[..., 6, 3:] = low
    return bias


def twice_the_lowest(dtype: torch.dtype) -> Tensor:
    """A causal mask and a padding mask of finfo.min, added as old models do."""
    low = torch.finfo(dtype).min
    causal = torch.full((QUERIES, KEYS), low).triu(1).to(dtype)
    padding = torch.zeros(2, 1, 1, KEYS, dtype=dtype)
    padding[0, ..., :30] = low
    return causal + padding


LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16)}


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, length, HEADS, 16).to(dtype) for length in (QUERIES, KEYS, KEYS)]


def error_of(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("low", [-1e9, -3e9, -1e12, -1e30, -1e38, LOWEST[torch.bfloat16], LOWEST[torch.float32], 1e9])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_huge_bias_attend_as_in_float32(
    low: float, query_dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    query, key, value = inputs(query_dtype)
    bias = row_of(low, bias_dtype)
    found, lse = as_on_cuda(query, key, value, bias)
    plain = [tensor.float() for tensor in (query, key, value)]
    truth, true_lse = reference.attention(*plain, Bias(bias), scale=0.25, dtype=torch.float32)  # type: ignore[call-arg,misc]
    # Rows of bfloat16's -1e38 that round to -inf have no key, in either.
    assert error_of(found, truth.double()) < 4e-3
    assert torch.allclose(lse.double(), true_lse.double(), rtol=1e-5, atol=1e-3)


def test_without_the_adapters_function_such_rows_are_lost() -> None:
    query, key, value = inputs(torch.bfloat16)
    bias = row_of(LOWEST[torch.bfloat16] / 2, torch.float32)
    assert (
        not error_of(
            as_on_cuda(query, key, value, bias, plainly=True)[0],
            reference.attention(query, key, value, Bias(bias), scale=0.25)[0],
        )
        < 1e-2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16])
def test_masks_added_to_each_other_leave_what_is_left(dtype: torch.dtype, query_dtype: torch.dtype) -> None:
    query, key, value = inputs(query_dtype)
    bias = twice_the_lowest(dtype)
    assert bool(torch.isneginf(bias).any())
    truth = reference.attention(query, key, value, Bias(bias), scale=0.25)[0]
    assert error_of(as_on_cuda(query, key, value, bias)[0], truth) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_biases_keep_their_order(dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).min
    bias = torch.tensor(
        [-math.inf, low, low / 1.01, -2e38, -1e38, -1e30, -1e12, -2e9, -1e9, -3.0, 0.0, 5.0, 1e9, 1e38]
    ).to(dtype)
    close = compressed(bias.float())
    assert bool((close.diff() > 20).logical_or(bias.float().abs()[1:] < 10).all())
    assert torch.equal(close[9:12], bias[9:12].float())
    assert bool((close[1:].abs() * LOG2_E < 2 * FROM).all())


def test_gradients_of_scores_pass_huge_biases() -> None:
    bias = row_of(LOWEST[torch.float32], torch.float32)
    bias[..., 7, 4] = -math.inf
    score_mod = score_mod_of(spec_of(torch.bfloat16, bias), Parts(dense=bias), None)
    assert score_mod is not None
    score = torch.zeros(QUERIES, KEYS, requires_grad=True)
    zero = torch.zeros((), dtype=torch.int64)
    rows, columns = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
    found = score_mod(score, zero, zero, rows.expand_as(score), columns.expand_as(score))
    grad = torch.autograd.grad(found[5].sum() + found[6].sum(), score)[0]
    assert torch.equal(grad[5:7], torch.ones(2, KEYS))
