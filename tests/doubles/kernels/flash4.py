"""A double of flash-attn-4 (`flash_attn.cute`).

Source: `flash_attn/cute/interface.py` of flash-attention, 4.0.0b36; that version on an H100.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from doubles.double import (
    Double,
    attend,
    band,
    module,
    packed_band,
    uninitialised_gradient,
    unwritten_rows,
    unwritten_tails,
    used_band,
)

_INFINITE = math.inf


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention, `(B, S, H, D)`; always a pair, of which the lse may be None."""
    _check(q, k, v, learnable_sink)
    allowed = band(q.shape[1], k.shape[1], *_sides(window_size, causal), lower_right=True)
    return _attend(q, k, v, softmax_scale, allowed, softcap, learnable_sink, return_lse)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable[..., Any] | None = None,
    score_mod_bwd: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: tuple[Any, ...] | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Packed attention `(T, H, D)`, or `(B, S, H, D)` of which each entry's first `seqused_k` keys are used."""
    _check(q, k, v, learnable_sink)
    for lengths in (cu_seqlens_q, cu_seqlens_k, seqused_k):
        assert lengths is None or lengths.dtype == torch.int32, "cu_seqlens and seqused must be int32"
    sides = _sides(window_size, causal)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        if seqused_k is None:
            return flash_attn_func(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                learnable_sink=learnable_sink,
                softcap=softcap,
                return_lse=return_lse,
            )
        v = uninitialised_gradient(v, seqused_k)
        allowed = used_band(seqused_k, q.shape[1], k.shape[1], *sides)
        return _attend(q, k, v, softmax_scale, allowed, softcap, learnable_sink, return_lse)
    allowed = packed_band(cu_seqlens_q, cu_seqlens_k, len(q), len(k), *sides, lower_right=True)
    tensors = unwritten_tails(q, k, v, cu_seqlens_q, cu_seqlens_k)
    out, lse = _attend(*tensors, softmax_scale, allowed, softcap, learnable_sink, return_lse)
    out = unwritten_rows(out[0], cu_seqlens_q)
    return out, None if lse is None else unwritten_rows(lse[0], cu_seqlens_q, 1)


def _sides(window_size: tuple[int | None, int | None], causal: bool) -> list[float]:
    left, right = window_size
    if causal:
        return [_INFINITE if left is None else left, 0]
    if left is not None and right is not None and left + right < 0:
        left = right = None  # (-1, 0), causal to its forerunners, is full attention here
    # -1 is an offset like any other: (5, -1) leaves a row's own position out.
    return [_INFINITE if side is None else side for side in (left, right)]


def _check(q: Tensor, k: Tensor, v: Tensor, learnable_sink: Tensor | None) -> None:
    assert v.dtype in (torch.float16, torch.bfloat16), "inputs must be float16, bfloat16, or fp8"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    dim, dim_v = q.shape[-1], v.shape[-1]
    assert 8 <= dim <= 256 and 8 <= dim_v <= 256, "head_dim must be between 8 and 256"  # noqa: PT018
    assert dim % 8 == 0 and dim_v % 8 == 0, "head_dim must be divisible by 8"  # noqa: PT018
    assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"
    assert k.shape[:-1] == v.shape[:-1]
    if learnable_sink is not None:
        assert learnable_sink.shape == (q.shape[-2],)
        assert learnable_sink.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert not (k is v and dim_v == 512), "read as absorbed MLA"


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    allowed: Tensor,
    softcap: float,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    out, lse = _Attend.apply(q, k, v, scale, allowed, softcap, sinks)  # type: ignore[no-untyped-call]
    return out, lse if return_lse else None


class _Attend(torch.autograd.Function):
    """The kernel's forward and backward, which autograd sees as one node, as upstream's functions are.

    So the gradients also come where autograd records no operators: inside a registered one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        allowed: Tensor,
        softcap: float,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend(query, key, value, scale=scale, allowed=allowed, softcap=softcap, sinks=sinks)
        if scale <= 0:
            out = out * float("nan")
        ctx.save_for_backward(query, key, value, out, lse, allowed)
        ctx.scale, ctx.softcap = scale, softcap
        narrow = lse.float()
        ctx.mark_non_differentiable(narrow)
        return out, narrow

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, allowed = ctx.saved_tensors
        group = query.shape[2] // key.shape[2]
        shared = (*key.shape[:3], group, -1)
        wide_q, flow = query.double(), grad.double()
        wide_k, wide_v = (tensor.double().repeat_interleave(group, 2) for tensor in (key, value))
        scores = torch.einsum("bihd,bjhd->bhij", wide_q, wide_k) * ctx.scale
        slope: Tensor | float = 1.0
        if ctx.softcap:
            bent = torch.tanh(scores / ctx.softcap)
            scores, slope = bent * ctx.softcap, 1 - bent * bent
        scores = scores.masked_fill(~allowed, float("-inf"))
        alive = ~torch.isneginf(lse)
        shifted = scores - torch.where(alive, lse, 0.0).unsqueeze(-1)
        weights = torch.where(alive.unsqueeze(-1), torch.exp(shifted), 0.0)
        of_row = (flow * out.double()).sum(-1).transpose(1, 2).unsqueeze(-1)
        of_score = weights * (torch.einsum("bihd,bjhd->bhij", flow, wide_v) - of_row) * slope * ctx.scale
        of_query = torch.einsum("bhij,bjhd->bihd", of_score, wide_k)
        of_key = torch.einsum("bhij,bihd->bjhd", of_score, wide_q).reshape(shared).sum(3)
        of_value = torch.einsum("bhij,bihd->bjhd", weights, flow).reshape(shared).sum(3)
        if query.shape[-1] % 32 or value.shape[-1] != query.shape[-1]:
            # Wrong over several tiles, or an error, on an H100; NaN here, so that no tolerance lets it through.
            of_query, of_key, of_value = (wrong * float("nan") for wrong in (of_query, of_key, of_value))
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None, None, None


def _modules() -> Mapping[str, types.ModuleType]:
    functions: dict[str, Any] = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    # The version constant looks up a distribution that doesn't exist, and so is always this.
    cute = module("flash_attn.cute", __version__="0.0.0", **functions)
    # The namespace alone: no function and no version.
    return {"flash_attn": module("flash_attn", cute=cute), "flash_attn.cute": cute}


DOUBLE = Double("flash4", {"flash-attn-4": "4.0.0b36"}, _modules, frozenset(("flash_attn.cute",)))
