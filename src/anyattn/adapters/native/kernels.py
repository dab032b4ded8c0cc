"""The calls of torch's SDPA and its aten ops, each with the conversions that its arguments need.

The aten ops lack SDPA's conversions: the math and the cuDNN op read a boolean mask as numbers, the CPU flash op ignores
strides along head_dim, and none pads. So every entry that calls one makes the mask additive, in query's dtype.
Source: torch 2.13, run on a CPU; `aten/src/ATen/native/transformers/attention.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.adapters.native import packed
from anyattn.backend.protocol import Output, Parts, Plan
from anyattn.lowering.dense import (
    additive,
    aligned_bias,
    cached_key_bias,
    cached_within_base_2,
    joined_mask,
    pattern_mask,
    within_base_2,
)
from anyattn.lowering.key_layout import cached_padding
from anyattn.lowering.lse import normalise_lse, repeat_heads, with_huge_biases
from anyattn.lowering.storage import realigned
from anyattn.process import tracing
from anyattn.types.spec import AttentionSpec, PatternSpec

FUSED_CUDA: frozenset[str] = frozenset(("flash", "efficient", "cudnn"))

_Entry = Callable[[AttentionSpec, Tensor, Tensor, Tensor, "Tensor | None", bool], tuple[Tensor, "Tensor | None"]]


def _sdpa(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, None]:
    out = torch._C._nn.scaled_dot_product_attention(
        query, key, value, mask, spec.dropout_p, is_causal, scale=spec.scale, enable_gqa=spec.is_gqa
    )
    return out, None


def _sdpa_additive(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, None]:
    assert mask is not None
    return _sdpa(spec, query, key, value, aligned_bias(mask, query, key), is_causal)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flash_cpu(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    # The op ignores head_dim's stride, and silently returns wrong results if it isn't 1.
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    bias = None if mask is None else additive(mask, query.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=spec.scale
    )
    return out, lse


def _math(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    bias = None if mask is None else additive(mask, query.dtype)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, bias, spec.dropout_p, is_causal, None, scale=spec.scale, enable_gqa=spec.is_gqa
    )
    return out, _lse_of_scores(spec, query, key, bias, is_causal) if spec.return_lse or spec.sinks else None


def _lse_of_scores(spec: AttentionSpec, query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
    """Compute the log-sum-exp of the scores, in float32 at least; the op returns no lse."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.no_grad():
        keys = repeat_heads(key.detach().to(dtype), spec.num_heads // spec.num_kv_heads)
        scores = query.detach().to(dtype) @ keys.transpose(-1, -2) * spec.scale
        if bias is not None:
            scores = scores + bias.detach().to(dtype)
        if is_causal:
            allowed = pattern_mask(_CAUSAL, query.shape[2], key.shape[2], query.device, (query, key))
            scores = scores.masked_fill(~allowed, float("-inf"))
        return torch.logsumexp(scores, -1)


_CAUSAL = PatternSpec(-1, 0, "upper_left")


def _written_out(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute with matrix products and a softmax, in float32 at least: where torch's own kernel or export is wrong."""
    assert not is_causal
    times = spec.num_heads // spec.num_kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = [tensor.to(dtype) for tensor in (query, repeat_heads(key, times), repeat_heads(value, times))]
    scores = wide[0] @ wide[1].transpose(-2, -1) * spec.scale
    if mask is not None:
        scores = scores + additive(mask, scores.dtype)
    top = scores.detach().amax(-1, keepdim=True)
    # A row without a key is -inf throughout: it gives zeros, and finite gradients.
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    weights = F.dropout(weights, spec.dropout_p) if spec.dropout_p else weights
    return (weights @ wide[2]).to(query.dtype), (top + total.log()).squeeze(-1)


def _pad_head_dim(tensor: Tensor) -> Tensor:
    left_over = tensor.shape[-1] % 8
    return F.pad(tensor, (0, 8 - left_over)) if left_over else tensor


def _flash(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        _pad_head_dim(query),
        _pad_head_dim(key),
        _pad_head_dim(value),
        spec.dropout_p,
        is_causal,
        False,
        scale=spec.scale,
    )
    lse = result[1]
    if spec.return_lse or spec.sinks:
        # FlashAttention-2 writes +inf for rows without a key.
        lse = torch.where(lse == float("inf"), float("-inf"), lse)
    return result[0][..., : spec.head_dim_v], lse


def _efficient(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    if spec.storage.expanded_kv:
        key, value = key.contiguous(), value.contiguous()
    bias = None if mask is None else aligned_bias(mask, query, key)
    with_lse = spec.return_lse or spec.sinks or spec.needs_grad
    result = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, with_lse, spec.dropout_p, is_causal, scale=spec.scale
    )
    # The kernel pads lse to a multiple of 32 rows.
    return result[0], result[1][..., : query.shape[2]]


def _cudnn(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    bias = None if mask is None else aligned_bias(mask, query, key)
    with_lse = spec.return_lse or spec.sinks or spec.needs_grad
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, with_lse, spec.dropout_p, is_causal, False, scale=spec.scale
    )
    lse = result[1]
    if lse is None or not (spec.return_lse or spec.sinks):
        return result[0], None  # torch 2.11 returns None if no lse is computed
    # (B, H, S_q, 1) from torch 2.9 on, (B, H, S_q) before.
    return result[0], lse.squeeze(-1) if lse.dim() == 4 else lse


_ENTRIES: Mapping[str, _Entry] = {
    "sdpa": _sdpa,
    "sdpa_additive": _sdpa_additive,
    "flash_cpu": _flash_cpu,
    "math": _math,
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "written_out": _written_out,
}


def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Call the entry that the plan names; inputs and outputs are in the spec's layout."""
    spec, lowering = plan.spec, plan.lowering
    if spec.packed:
        return packed.run(plan, query, key, value, parts)
    if spec.layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if lowering.copy:
        query, key, value = realigned(query), realigned(key), realigned(value)
    if lowering.repeat_heads:
        times = spec.num_heads // spec.num_kv_heads
        key, value = repeat_heads(key, times), repeat_heads(value, times)
    dtype = query.dtype
    if lowering.upcast:
        query, key, value = query.float(), key.float(), value.float()
    given = parts
    if parts.key is not None:
        # Dynamo before torch 2.9 traces no NamedTuple's _replace.
        parts = Parts(cached_padding(parts.key, key.shape[2]), parts.dense, parts.block, parts.sinks)
    # ONNX has no kernel's lse, and its attention gives rows without a key the mean of all values.
    written_out = tracing.exports_onnx() and (spec.return_lse or spec.sinks or not spec.mask.is_empty)
    entry, is_causal = ("written_out", False) if written_out else (lowering.entry, lowering.is_causal)
    lengths, pattern = (query.shape[2], key.shape[2]), not is_causal
    mask = joined_mask(spec, parts, *lengths, query.device, pattern=pattern, batch=query.shape[0], like=(query, key))
    if mask is not None and misread(spec):
        mask = mask.to(query.dtype)
    if mask is not None and lowering.copy and spec.device_type == "mps" and lengths[0] <= 8:
        shape = (query.shape[0], query.shape[1], *lengths)
        mask = mask.expand(shape).contiguous()
    passed = _mask_argument(mask, given, plan, query.dtype)
    out, lse = _ENTRIES[entry](spec, query, key, value, passed, is_causal)
    if lowering.upcast:
        out = out.to(dtype)
    if spec.layout == "BSHD":
        out = out.transpose(1, 2)
    if not (spec.return_lse or spec.sinks):
        return out
    if lse is None:
        raise AssertionError(f"the entry {lowering.entry} returns no lse")
    lse = normalise_lse(lse, mask, keep=spec.sinks)
    if mask is not None and spec.device_type == "cuda" and mask.dtype in (torch.bfloat16, torch.float32):
        lse = with_huge_biases(lse, mask)
    return out, lse


_BASE_2 = frozenset(("sdpa", "sdpa_additive", "efficient", "cudnn"))
_ADDITIVE = frozenset(("sdpa_additive", "efficient", "cudnn"))


def _mask_argument(mask: Tensor | None, given: Parts, plan: Plan, dtype: torch.dtype) -> Tensor | None:
    """Return the mask that is passed to an entry; for CUDA, what is computed from the user's tensor is cached."""
    spec, entry = plan.spec, plan.lowering.entry
    if mask is None or spec.device_type != "cuda" or entry not in _BASE_2:
        return mask
    if mask.dtype != torch.bool:
        return cached_within_base_2(mask) if mask is given.dense else within_base_2(mask)
    pattern = spec.mask.pattern is not None and not plan.lowering.is_causal
    if given.key is None or given.dense is not None or given.block is not None or pattern or entry not in _ADDITIVE:
        return mask
    return cached_key_bias(given.key, mask.shape[-1], dtype)


def misread(spec: AttentionSpec) -> bool:
    """Whether the CPU flash kernel loses -inf: a float32 bias, a float64 query, 16 keys or more (torch 2.13)."""
    dense = spec.mask.dense
    return dense is not None and dense.kind == "bias" and spec.dtype == torch.float64 and dense.dtype != spec.dtype
