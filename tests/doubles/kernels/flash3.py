"""Doubles of FlashAttention-3: the whole build, fa3-fwd, tokenspeed-fa3, and builds that return lse always or never.

Source: `hopper/flash_attn_interface.py` and `hopper/flash_api.cpp` of flash-attention, tokenspeed-fa3 3.0.0 (by
reading); fa3-fwd 0.0.3 on an H100.
"""

from __future__ import annotations

import functools
import inspect
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
    unwritten_rows,
    unwritten_tails,
    used_band,
)

_INFINITE = math.inf
_FP8 = torch.float8_e4m3fn


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Dense attention, `(B, S, H, D)`; causal and windows are aligned to the lower right."""
    _check(q, k, v)
    allowed = band(q.shape[1], k.shape[1], *_sides(window_size, causal), lower_right=True)
    out, lse = _attend(q, k, v, (q_descale, k_descale, v_descale), softmax_scale, allowed, softcap)
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Packed attention `(T, H, D)`, or `(B, S, H, D)` of which each entry's first `seqused_k` keys are used."""
    _check(q, k, v)
    for lengths in (cu_seqlens_q, cu_seqlens_k, seqused_k):
        if lengths is not None and lengths.dtype != torch.int32:
            raise RuntimeError("cu_seqlens and seqused must have dtype int32")
    sides = _sides(window_size, causal)
    descale = (q_descale, k_descale, v_descale)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        assert seqused_k is not None
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError("the double shows no backward beside seqused_k: none was ever run")
        allowed = used_band(seqused_k, q.shape[1], k.shape[1], *sides)
        out, lse = _attend(q, k, v, descale, softmax_scale, allowed, softcap)
        return (out, lse) if return_attn_probs else out
    allowed = packed_band(cu_seqlens_q, cu_seqlens_k, len(q), len(k), *sides, lower_right=True)
    tensors = unwritten_tails(q, k, v, cu_seqlens_q, cu_seqlens_k)
    found, found_lse = _attend(*tensors, descale, softmax_scale, allowed, softcap)
    out, lse = unwritten_rows(found[0], cu_seqlens_q), unwritten_rows(found_lse[0], cu_seqlens_q, 1)
    return (out, lse) if return_attn_probs else out


def _sides(window_size: tuple[int, int], causal: bool) -> list[float]:
    left, right = window_size
    return [_INFINITE if side < 0 else side for side in (left, 0 if causal else right)]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, _FP8):
        raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("query, key and value must have the same dtype")
    dim, dim_v = q.shape[-1], v.shape[-1]
    if dim > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if dim % (16 if q.dtype == _FP8 else 8):
        raise RuntimeError("head_size should be a multiple of 8, or of 16 in fp8")
    if dim != dim_v and not ((128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512)):
        raise RuntimeError("If V headdim is different from Q/K dim, we only support some pairs")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    descale: tuple[Tensor | None, Tensor | None, Tensor | None],
    softmax_scale: float | None,
    allowed: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    if q.dtype == _FP8:
        group = q.shape[2] // k.shape[2]
        q, k, v = (
            tensor.double()
            * (1.0 if by is None else by.repeat_interleave(tensor.shape[2] // k.shape[2], 1)[:, None, :, None].double())
            for tensor, by in zip((q, k, v), descale, strict=True)
        )
        assert q.shape[2] == group * k.shape[2]
        out, lse = attend(q, k, v, scale=scale, allowed=allowed, softcap=softcap)
        out = out.to(torch.bfloat16)
    else:
        out, lse = attend(q, k, v, scale=scale, allowed=allowed, softcap=softcap)
    if scale <= 0:
        out = out * float("nan")
    return out, lse.detach().float()


def _forward_only(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(q: Tensor, *rest: Any, **options: Any) -> Any:
        if q.dtype == torch.float16:
            raise RuntimeError("This flash attention build does not support fp16.")
        sides = options.get("window_size", (-1, -1))
        if tuple(sides) not in ((-1, -1), (-1, 0)):
            raise RuntimeError("This flash attention build does not support local attention.")
        result = function(q, *rest, **options)
        # The backward that autograd would find raises; here the result has none.
        return tuple(t.detach() for t in result) if isinstance(result, tuple) else result.detach()

    return forward


def _returning(function: Callable[..., Any], always: bool) -> Callable[..., Any]:
    """Give the function as builds before September 2025 had it: without the flag."""

    def old(*tensors: Any, **options: Any) -> Any:
        if "return_attn_probs" in options:
            raise TypeError("flash_attn_func() got an unexpected keyword argument 'return_attn_probs'")
        out, lse = function(*tensors, **options, return_attn_probs=True)
        return (out, lse) if always else out

    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.name != "return_attn_probs"]
    old.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return old


class _LateBackward(torch.autograd.Function):
    """An output that is accepted with gradients, and raises where they are wanted."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("This flash attention build does not support backward.")


def _tokenspeed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, sinks: Tensor | None = None, **options: Any) -> Any:
        if options.get("softcap"):
            raise RuntimeError("This flash attention build does not support tanh softcapping.")
        if sinks is not None:
            raise NotImplementedError("the double has no sinks")
        result = function(q, k, v, *rest, **options)
        out, lse = result if isinstance(result, tuple) else (result, None)
        if q.shape[-1] <= 64 < v.shape[-1]:
            # The kernel for 64 and 64 runs: what is beyond is never written.
            out = out.clone()
            out[..., 64:] = torch.nan
        if out.requires_grad:
            out = _LateBackward.apply(out)  # type: ignore[no-untyped-call]
        return out if lse is None else (out, lse)

    signature = inspect.signature(function)
    extra = inspect.Parameter("sinks", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), extra]
    )
    return forward


_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, "
    "int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, "
    "Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, "
    "Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, "
    "bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, "
    "bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
"""The operator's schema in fa3-fwd 0.0.3."""

_LIBRARY = torch.library.Library("anyattn_double_fa3", "DEF")
_LIBRARY.define(_SCHEMA)

OPERATOR_CALLS: list[tuple[Any, ...]] = []
"""What the operator was called with, query, key and value left out."""


def _fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    schema = torch.ops.anyattn_double_fa3.fwd.default._schema  # type: ignore[attr-defined]
    # What equals its default at the end is left out by the dispatcher.
    given = {argument.name: argument.default_value for argument in schema.arguments[3:]}
    given.update(zip(given, rest, strict=False))
    OPERATOR_CALLS.append(rest)
    if given["num_splits"] not in (0, 1):
        raise RuntimeError("the double knows one split, and the kernel's own number")
    options = {
        "softmax_scale": given["softmax_scale"],
        "causal": given["is_causal"],
        "window_size": (given["window_size_left"], given["window_size_right"]),
        "softcap": given["softcap"],
        "return_attn_probs": True,
    }
    if given["seqused_k"] is None:
        out, lse = flash_attn_func(q, k, v, **options)
    else:
        lengths = (given["max_seqlen_q"], given["max_seqlen_k"], None, given["seqused_k"])
        out, lse = flash_attn_varlen_func(q, k, v, None, None, *lengths, **options)
    return out, lse, out.new_empty(0), out.new_empty(0)


_LIBRARY.impl("fwd", _fwd, "CPU")


def _modules(name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Mapping[str, types.ModuleType]:
    functions = {function.__name__: change(function) for function in (flash_attn_func, flash_attn_varlen_func)}
    return {name: module(name, **functions)}


def _whole() -> Mapping[str, types.ModuleType]:
    return _modules("flash_attn_interface", lambda function: function)


def _fa3_fwd() -> Mapping[str, types.ModuleType]:
    modules = _modules("fa3_fwd_interface", _forward_only)
    modules["fa3_fwd_interface"].fa3_fwd_cuda = torch.ops.anyattn_double_fa3  # type: ignore[attr-defined]
    return modules


_FOUND = frozenset(("flash_attn_interface",))
_FEATURES = ("BACKWARD", "SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "FP8", "VARLEN")
_DIMS = ("HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "SM8x", "HDIMDIFF64", "HDIMDIFF192")


def without(*features: str) -> Mapping[str, Mapping[str, bool]]:
    """Say what a build left out, as its flash_attn_config does."""
    return {"flash_attn_config": {name: name in features for name in (*_FEATURES, *_DIMS)}}


_OWN = {"flash-attn-3": "3.0.0"}

DOUBLE = Double("flash3", _OWN, _whole, _FOUND, builds=without())
FP8 = Double("flash3_fp8", _OWN, _whole, _FOUND, builds=without())
FORWARD = Double("flash3", {"fa3-fwd": "0.0.3"}, _fa3_fwd, frozenset(("fa3_fwd_interface",)))
TOKENSPEED = Double(
    "flash3",
    {"tokenspeed-fa3": "3.0.0.post20260810"},
    lambda: _modules("flash_attn_interface", _tokenspeed),
    _FOUND,
    builds=without("BACKWARD", "SOFTCAP", "HDIM96", "SM8x", "HDIMDIFF64", "HDIMDIFF192"),
)
# Builds of 2025 had no flash_attn_config.
ALWAYS_LSE = Double(
    "flash3", _OWN, lambda: _modules("flash_attn_interface", lambda function: _returning(function, True)), _FOUND
)
NEVER_LSE = Double(
    "flash3", _OWN, lambda: _modules("flash_attn_interface", lambda function: _returning(function, False)), _FOUND
)
