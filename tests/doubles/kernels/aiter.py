"""A double of AITER's attention, as of amd-aiter 0.1.18: window_size has three entries.

Sources: `aiter/ops/mha.py` of ROCm/aiter e4048607 and of amd-aiter 0.1.7. No AMD GPU was run.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from doubles.double import Double, attend, band, module, packed_band, unwritten_tails


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, ...] = (-1, -1, 0),
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    how_v3_bf16_cvt: int | None = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    sink_ptr: Tensor | None = None,
    num_splits: int = 0,
) -> Any:
    """Dense attention, `(B, S, H, D)`; causal and windows are aligned to the lower right."""
    _check(q, k, v, (bias, alibi_slopes, cu_seqlens_q, cu_seqlens_kv, sink_ptr), window_size)
    sides = _sides(window_size, causal, k.shape[1])
    allowed = band(q.shape[1], k.shape[1], *sides, lower_right=True)
    out, lse = _attend(q, k, v, dropout_p, softmax_scale, allowed, 0.0)
    if causal and q.shape[1] != k.shape[1]:
        # The backward of some kernels is aligned to the upper left.
        out = _Wrong.apply(out)  # type: ignore[no-untyped-call]
    return _result(q, k, v, out, torch.where(torch.isneginf(lse), math.inf, lse), return_lse, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    min_seqlen_q: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    window_size: tuple[int, ...] = (-1, -1, 0),
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    how_v3_bf16_cvt: int | None = 1,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_k_padded: Tensor | None = None,
    sink_ptr: Tensor | None = None,
) -> Any:
    """Packed attention, `(T, H, D)`; cumulative lengths begin with 0. A softcap has no part in the backward."""
    others = (bias, alibi_slopes, block_table, out, cu_seqlens_q_padded, cu_seqlens_k_padded, sink_ptr)
    _check(q, k, v, others, window_size)
    for cu_seqlens in (cu_seqlens_q, cu_seqlens_k):
        if cu_seqlens.dtype != torch.int32:
            raise RuntimeError("cu_seqlens must have dtype int32")
    sides = _sides(window_size, causal, max_seqlen_k)
    allowed = packed_band(cu_seqlens_q, cu_seqlens_k, len(q), len(k), *sides, lower_right=True)
    # What isn't written holds rubbish: rows of sequences without keys, and gradients of queries there.
    dead = ~allowed.any(-1)
    tensors = unwritten_tails(_rubbish(q, dead), k, v, cu_seqlens_q, cu_seqlens_k)
    found, lse = _attend(*tensors, dropout_p, softmax_scale, allowed, logits_soft_cap)
    found = torch.where(dead[None, :, None, None], math.nan, found)
    return _result(q, k, v, found[0], lse[0], return_lse, return_attn_probs)


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(1)


class _Rubbish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.masked_fill(rows[:, None, None], math.nan), None


def _rubbish(tensor: Tensor, rows: Tensor) -> Tensor:
    """Give a tensor whose gradient is uninitialised in some rows."""
    found: Tensor = _Rubbish.apply(tensor, rows)  # type: ignore[no-untyped-call]
    return found


def _check(q: Tensor, k: Tensor, v: Tensor, others: tuple[Tensor | None, ...], window_size: tuple[int, ...]) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if max(q.shape[-1], v.shape[-1]) > 256:
        raise RuntimeError("head dimension at most 256")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if any(other is not None for other in others):
        raise NotImplementedError("the double has no bias, alibi, paging, padding and sinks")
    if len(window_size) != 3:
        raise IndexError("window_size has three entries: left, right, sink size")


def _sides(window_size: tuple[int, ...], causal: bool, seqlen_k: int) -> tuple[float, float]:
    left, right = (-1 if side >= seqlen_k else side for side in window_size[:2])
    if causal:
        return (math.inf if left < 0 else left), 0
    if not (left > 0 or right > 0):
        return math.inf, math.inf  # counts as no window: fast paths compute it unmasked
    return (math.inf if left < 0 else left), (math.inf if right < 0 else right)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, allowed: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    out, lse = attend(q, k, v, scale=scale, allowed=allowed, softcap=softcap, dropout_p=dropout_p)
    return out, lse.detach().float()


def _result(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, return_lse: bool, return_softmax: bool) -> Any:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        assert return_lse
    result = [out]
    if return_lse:
        result.append(lse)
    if return_softmax:
        result.append(torch.zeros(0))  # what dropout left, and not lse
    return result[0] if len(result) == 1 else tuple(result)


def _modules() -> Mapping[str, types.ModuleType]:
    functions: dict[str, Any] = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    mha = module("aiter.ops.mha", **functions)
    ops = module("aiter.ops", mha=mha)
    return {"aiter": module("aiter", ops=ops, **functions), "aiter.ops": ops, "aiter.ops.mha": mha}


DOUBLE = Double("aiter", {"amd-aiter": "0.1.18"}, _modules, frozenset(("aiter.ops.mha",)))
