"""The CUDA entries of native and flex against doubles, which do on a CPU what kernels did on an H100 with torch 2.11.

A double proves the adapter, never the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn import masks, reference
from anyattn.adapters.flex.mods import score_mod_of
from anyattn.adapters.native import kernels, short
from anyattn.backend.protocol import Lowering, Parts, Plan
from anyattn.lowering.dense import HUGE, within_base_2
from anyattn.lowering.lse import with_huge_biases
from anyattn.masks.objects import Mask
from anyattn.masks.values import parts_of
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec

LOG2_E = torch.tensor(1.4426950408889634)


def base_2(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention (B, H, S, D) as the fused kernels do: to base 2, a row of nothing but -inf giving zeros."""
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if bias is not None:
        assert bias.dtype == query.dtype
        assert tuple(bias.shape) == tuple(scores.shape)
        scores = scores + bias.float()
    scores = scores * LOG2_E
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    weights = torch.exp2(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = weights @ value.float() / torch.where(total == 0, 1.0, total)
    return out.to(query.dtype), ((torch.log2(total) + top) / LOG2_E).squeeze(-1)


class Doubles:
    """Stand in for ops of `torch.ops.aten`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.kept_lse: list[bool] = []

    def _scaled_dot_product_cudnn_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
    ) -> tuple[Any, ...]:
        self.calls.append("cudnn")
        out, lse = base_2(query, key, value, bias, scale)
        # None where it isn't asked for: torch 2.11 gives an undefined tensor.
        return out, lse.unsqueeze(-1) if compute_log_sumexp else None

    def _scaled_dot_product_efficient_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        compute_log_sumexp: bool,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float,
    ) -> tuple[Any, ...]:
        self.calls.append("efficient")
        self.kept_lse.append(compute_log_sumexp)
        out, lse = base_2(query, key, value, bias, scale)
        # Rows are padded to a multiple of 32.
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        return out, padded if compute_log_sumexp else lse.new_empty(0)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Doubles:
    found = Doubles()
    for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"):
        monkeypatch.setattr(torch.ops.aten, name, getattr(found, name))
    return found


def spec_of(dtype: torch.dtype, mask: Mask | None, **changes: Any) -> AttentionSpec:
    dense = None
    if mask is not None and mask.dense is not None:
        kind: Any = "boolean" if mask.dense.dtype == torch.bool else "bias"
        dense = DenseSpec(kind, mask.dense.dtype, (1, 1, 7, 24))
    pattern = None if mask is None or mask.pattern is None else PatternSpec(*mask.pattern)
    key: Any = None if mask is None or mask.key is None else "padding"
    fields: dict[str, Any] = {
        "batch": 2,
        "seqlen_q": 7,
        "seqlen_kv": 24,
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 16,
        "head_dim_v": 16,
        "dtype": dtype,
        "device_type": "cuda",
        "scale": 0.25,
        "mask": MaskSpec(pattern=pattern, key=key, dense=dense, dead_rows=True),
        "same_lengths": False,
    }
    return AttentionSpec(**(fields | changes))


def tensors(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, length, 3, 16).to(dtype) for length in (7, 24, 24)]


def dead_boolean() -> Mask:
    allowed = torch.rand(2, 1, 7, 24) > 0.4
    allowed[:, :, 3] = False
    return masks.Boolean(allowed)


def padding_of_nothing() -> Mask:
    allowed = torch.ones(2, 24, dtype=torch.bool)
    allowed[0] = False
    return masks.KeyPadding(allowed)


def lowest(dtype: torch.dtype) -> Mask:
    bias = torch.randn(1, 1, 7, 24).to(dtype)
    bias[..., 2, :] = torch.finfo(dtype).min
    bias[..., 4, 5:] = -math.inf
    bias[..., 5, :] = -math.inf
    bias[..., 6, :] = -2.5e38
    bias[..., 6, 3] = -2.0e38
    return masks.Bias(bias)


def assert_right(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.allclose(found.double(), truth, rtol=tolerance, atol=tolerance)


MASKS: dict[str, Callable[[torch.dtype], Mask | None]] = {
    "no mask": lambda dtype: None,
    "boolean": lambda dtype: dead_boolean(),
    "padding": lambda dtype: padding_of_nothing(),
    "window": lambda dtype: masks.SlidingWindow(0, 0, "lower_right"),
    "lowest": lowest,
}


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("entry", "dtype"), [("cudnn", torch.bfloat16), ("efficient", torch.bfloat16), ("efficient", torch.float32)]
)
def test_fused_entries_are_right_where_rows_have_no_key_or_only_the_lowest_bias(
    doubles: Doubles, entry: str, dtype: torch.dtype, kind: str, lse: bool
) -> None:
    mask = MASKS[kind](dtype)
    query, key, value = tensors(dtype)
    plan = Plan("native", spec_of(dtype, mask, return_lse=lse), Lowering(entry, dense=True))
    result = kernels.run(plan, query, key, value, parts_of(mask, None))
    assert doubles.calls == [entry]
    truth, true_lse = reference.attention(query, key, value, mask, scale=0.25)
    assert isinstance(result, tuple) is lse
    assert_right(result[0] if isinstance(result, tuple) else result, truth, dtype)
    if isinstance(result, tuple):
        assert_right(result[1], true_lse, dtype)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize(
    ("entry", "kind"), [("sdpa_additive", "boolean"), ("sdpa_additive", "padding"), ("sdpa", "lowest")]
)
def test_sdpa_gets_an_additive_mask_that_no_kernel_loses(
    monkeypatch: pytest.MonkeyPatch, kind: str, layout: Any, entry: str
) -> None:
    given: list[Tensor] = []

    def double(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert attn_mask.dtype == query.dtype
        given.append(attn_mask)
        bias = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return base_2(query, key, value, bias, 0.25)[0]

    monkeypatch.setattr(torch._C._nn, "scaled_dot_product_attention", double)
    mask = MASKS[kind](torch.bfloat16)
    tensor = mask.dense if mask is not None and mask.dense is not None else mask
    query, key, value = tensors(torch.bfloat16)
    truth = reference.attention(query, key, value, mask, scale=0.25)[0]
    if layout == "BHSD":
        query, key, value, truth = (t.transpose(1, 2) for t in (query, key, value, truth))
    plan = Plan("native", spec_of(torch.bfloat16, mask, layout=layout), Lowering(entry, dense=True))
    bound = short.bind_sdpa_masked(plan)
    assert bound is not None
    assert_right(bound(query, key, value, tensor), truth, torch.bfloat16)
    found = kernels.run(plan, query, key, value, parts_of(mask, None))
    assert isinstance(found, Tensor)
    assert_right(found, truth, torch.bfloat16)
    assert len(given) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_biases_keep_their_order_and_stay_finite_to_base_2(dtype: torch.dtype) -> None:
    low = torch.finfo(dtype).min
    bias = torch.tensor([low, low / 1.2, -HUGE, -HUGE / 2, -1e30, -3.0, 0.0, 5.0, -math.inf, math.inf], dtype=dtype)
    drawn = within_base_2(bias)
    assert torch.equal(drawn[2:], bias[2:])
    assert bool((drawn[:8].diff() > 0).all())
    assert bool(torch.isfinite(drawn[:8].float() * LOG2_E).all())
    leaf = bias.clone().requires_grad_()
    found = within_base_2(leaf)
    assert torch.allclose(found.detach(), drawn, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(torch.autograd.grad(found[:8].sum(), leaf)[0][:8], torch.ones(8, dtype=dtype))


def test_bias_of_float16_is_left_alone_as_base_2_loses_nothing_of_it() -> None:
    bias = torch.tensor([torch.finfo(torch.float16).min, 0.0], dtype=torch.float16)
    assert within_base_2(bias) is bias


def test_lse_of_a_row_of_huge_biases_is_the_largest_of_them() -> None:
    low = torch.finfo(torch.float32).min
    mask = torch.tensor([[low, low], [low, -2e38], [-math.inf, -math.inf], [low, 0.0]])
    lse = torch.tensor([-2.2e38, -1.5e38, -math.inf, 1.0])
    assert with_huge_biases(lse, mask).tolist() == [low, torch.tensor(-2e38).item(), -math.inf, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_on_cuda_keeps_rows_of_the_lowest_bias(dtype: torch.dtype) -> None:
    mask = lowest(dtype)
    score_mod = score_mod_of(spec_of(dtype, mask), Parts(dense=mask.dense), None)
    assert score_mod is not None
    zero = torch.zeros((), dtype=torch.int64)
    rows = torch.arange(7)[:, None].expand(7, 24)
    found = score_mod(torch.zeros(7, 24), zero, zero, rows, torch.arange(24).expand(7, 24)) * LOG2_E
    assert bool(torch.isfinite(found[2]).all())
    assert len(set(found[2].tolist())) == 1
    assert int(found[6].argmax()) == 3
    assert bool(torch.isneginf(found[5]).all())


@pytest.mark.parametrize("needs", [("mask",), ("query", "mask")])
def test_efficient_keeps_the_log_sum_exp_that_a_biass_gradient_needs(doubles: Doubles, needs: tuple[str, ...]) -> None:
    mask = masks.Bias(torch.randn(1, 1, 7, 24).to(torch.bfloat16).requires_grad_())
    plan = Plan("native", spec_of(torch.bfloat16, mask, requires_grad=needs), Lowering("efficient", dense=True))
    out = kernels.run(plan, *tensors(torch.bfloat16), parts_of(mask, None))
    assert doubles.kept_lse == [True]
    assert isinstance(out, Tensor)
    assert mask.dense is not None
    assert torch.autograd.grad(out.float().sum(), mask.dense)[0].shape == mask.dense.shape
