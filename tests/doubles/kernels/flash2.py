"""A double of flash-attn 2.8.

Source: `flash_attn/flash_attn_interface.py` and `csrc/flash_attn/flash_api.cpp` of flash-attention; a build of
2.8.3.post2 on an H100.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from doubles.double import Double, attend, band, module, packed_band, unwritten_rows, unwritten_tails

_INFINITE = math.inf


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Dense attention, `(B, S, H, D)`; causal and windows are aligned to the lower right."""
    _check(q, k, v, dropout_p, softcap, alibi_slopes)
    if q.shape[0] == 0:
        raise RuntimeError("batch size must be positive")
    if q.shape[1] == 0:
        raise RuntimeError("CUDA error: invalid configuration argument")  # and the context is lost
    allowed = band(q.shape[1], k.shape[1], *_sides(window_size, causal, k.shape[1]), lower_right=True)
    out, lse = _attend(q, k, v, dropout_p, softmax_scale, allowed, softcap)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Packed attention, `(T, H, D)`; cumulative lengths begin with 0, and each sequence is aligned by itself."""
    _check(q, k, v, dropout_p, softcap, alibi_slopes)
    for cu_seqlens in (cu_seqlens_q, cu_seqlens_k):
        if cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
            raise RuntimeError("cu_seqlens must be contiguous and have dtype int32")
    if block_table is not None:
        raise NotImplementedError("the double has no paged keys")
    sides = _sides(window_size, causal, max_seqlen_k)
    allowed = packed_band(cu_seqlens_q, cu_seqlens_k, len(q), len(k), *sides, lower_right=True)
    tensors = unwritten_tails(q, k, v, cu_seqlens_q, cu_seqlens_k)
    found, found_lse = _attend(*tensors, dropout_p, softmax_scale, allowed, softcap)
    out, lse = unwritten_rows(found[0], cu_seqlens_q), unwritten_rows(found_lse[0], cu_seqlens_q, 1)
    return (out, lse, None) if return_attn_probs else out


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softcap: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p >= 1:
        raise RuntimeError("Expected p_dropout < 1.f to be true, but got false.")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if v.shape[-1] != q.shape[-1] or k.shape != v.shape:
        raise RuntimeError("v must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if softcap and dropout_p:
        raise RuntimeError("Softcapping does not support dropout for now")
    if alibi_slopes is not None:
        raise NotImplementedError("the double has no alibi")


def _sides(window_size: tuple[int, int], causal: bool, seqlen_k: int) -> list[float]:
    left, right = window_size
    # Either side that is not below S_kv is taken for unbounded, which is wrong on the right where S_q > S_kv.
    left, right = (-1 if side >= seqlen_k else side for side in (left, right))
    if left >= 0 and right < 0 and not causal:
        right = seqlen_k  # what an unbounded right side beside a bounded left one is told the kernel as
    return [_INFINITE if side < 0 else side for side in (left, 0 if causal else right)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    allowed: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    out, lse = attend(q, k, v, scale=scale, allowed=allowed, softcap=softcap, dropout_p=dropout_p)
    if scale <= 0:
        out = out * float("nan")
    lse = lse.detach().float()
    return out, torch.where(torch.isneginf(lse), float("inf"), lse)


def _modules() -> Mapping[str, types.ModuleType]:
    functions: dict[str, Any] = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    interface = module("flash_attn.flash_attn_interface", **functions)
    package = module("flash_attn", __version__="2.8.3", flash_attn_interface=interface, **functions)
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


DOUBLE = Double(
    "flash2", {"flash-attn": "2.8.3"}, _modules, frozenset(("flash_attn", "flash_attn.flash_attn_interface"))
)
