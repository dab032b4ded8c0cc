"""The call of FlexAttention, compiled or eager."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.adapters.flex.huge import lse_with_bias
from anyattn.adapters.flex.mods import block_mask_of, score_mod_of
from anyattn.backend.protocol import Output, Parts, Plan
from anyattn.lowering.dense import joined_mask
from anyattn.lowering.lse import normalise_lse, repeat_heads
from anyattn.masks.base import serial_of
from anyattn.process.tracing import is_fake, is_plain
from anyattn.types.spec import UNKNOWN, AttentionSpec, Storage

_BASE_2 = torch.finfo(torch.float32).max * math.log(2)
"""Scores below minus this overflow to -inf in base 2."""


WRITTEN_OUT = "written out"
"""The entry of calls for which inductor can't compile flex_attention."""


def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Call FlexAttention as the plan says; inputs and outputs are in the spec's layout."""
    from torch.nn.attention.flex_attention import flex_attention

    spec = plan.spec
    call: Callable[..., Any] = flex_attention
    if spec.layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not spec.needs_grad and spec.device_type == "cpu":
        # The CPU refuses inputs that require a gradient even under no_grad.
        query, key, value = (t.detach() if t.requires_grad else t for t in (query, key, value))
    if plan.lowering.entry == WRITTEN_OUT:
        out = _written_out(spec, query, key, value, parts)
        return out.transpose(1, 2) if spec.layout == "BSHD" else out
    if plan.lowering.copy:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    seqlen_kv = key.shape[2]
    if plan.lowering.pad_keys:
        key, value = (F.pad(tensor, (0, 0, 0, -seqlen_kv % 16)) for tensor in (key, value))
    # Code that was compiled for real tensors reads memory that fake ones don't have.
    if plan.lowering.compiled and not torch.compiler.is_compiling() and is_plain() and not is_fake(query):
        lengths = (query.shape[0], query.shape[2], key.shape[2])
        call = _in_turn(_kind(plan), None if parts.block is None else serial_of(parts.block), lengths)
    with_lse = spec.return_lse or spec.sinks
    arguments: dict[str, Any] = {
        "score_mod": score_mod_of(spec, parts, seqlen_kv if plan.lowering.pad_keys else None),
        "block_mask": block_mask_of(plan, parts, query, key, seqlen_kv),
        "scale": spec.scale,
        "enable_gqa": spec.is_gqa,
    }
    if with_lse:
        arguments |= _lse_request()
    options = _kernel_options(spec, blocks=arguments["block_mask"] is not None)
    if options:
        arguments["kernel_options"] = options
    if plan.lowering.compiled or _warned:
        result = call(query, key, value, **arguments)
    else:
        result = _first_eager(call, query, key, value, arguments)
    out, extra = result if with_lse else (result, None)
    if spec.layout == "BSHD":
        out = out.transpose(1, 2)
    if extra is None:
        return out  # type: ignore[no-any-return]
    lse = normalise_lse(extra if isinstance(extra, Tensor) else extra.lse, None, keep=spec.sinks)
    if parts.dense is not None and parts.dense.is_floating_point() and parts.block is None:
        if spec.device_type == "cuda":
            mask = joined_mask(spec, parts, query.shape[2], seqlen_kv, lse.device, pattern=True)
            return out, lse if mask is None else lse_with_bias(lse, mask)
        lse = _with_huge_biases(lse, plan, parts, query.shape[2], seqlen_kv)
    return out, lse


def _written_out(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
    """Compute attention (B, H, S, D) in plain operations, in float32 at least, as eager FlexAttention does."""
    sizes = (query.shape[2], key.shape[2], query.device)
    mask = joined_mask(spec, parts, *sizes, pattern=True, batch=query.shape[0], like=(query, key))
    assert mask is not None
    dtype = torch.promote_types(query.dtype, torch.float32)
    times = spec.num_heads // spec.num_kv_heads
    query, key, value = query.to(dtype), repeat_heads(key.to(dtype), times), repeat_heads(value.to(dtype), times)
    scores = query @ key.transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(dtype)
    # For a row of -inf 0 is subtracted, or its weights would be NaN.
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total) @ value).to(spec.dtype)


def _kernel_options(spec: AttentionSpec, *, blocks: bool) -> dict[str, Any]:
    """Return inductor's options for CUDA: tiles that fit, and no kernel for short queries if it can't be used.

    That kernel, for fewer than 128 queries, makes one tile of the queries of all heads that share keys. Its size,
    rounded up to a power of 2, must divide a block of the block mask.
    """
    if spec.device_type != "cuda":
        return {}
    tiles: dict[str, Any] = _tiles(spec)
    rows = spec.seqlen_q * (spec.num_heads // spec.num_kv_heads)
    if spec.seqlen_q < 128 and ("BLOCK_M" in tiles or (blocks and (rows > 128 or spec.seqlen_q == UNKNOWN))):
        tiles["FORCE_USE_FLEX_ATTENTION"] = True
    return tiles


def _tiles(spec: AttentionSpec) -> dict[str, int]:
    """Return the tile sizes of a kernel for CUDA with a dense mask, whose tiles are in shared memory too.

    Inductor's choice needs more of it than an H100's 227 KiB (torch 2.11) for float32 biases of half-precision tensors
    from head_dim 64 on, and for any dense mask if head_dim > 128, which is rounded up to 256. BLOCK_M and BLOCK_N are
    the forward's, the others the backward's.
    """
    dense = spec.mask.dense
    if dense is None:
        return {}
    dim = max(spec.head_dim, spec.head_dim_v)
    backward = {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
    if dim > 128:
        # The backward of float32 has tiles of 16 anyway.
        return (
            {"BLOCK_M": 32, "BLOCK_N": 16} if spec.dtype == torch.float32 else {"BLOCK_M": 64, "BLOCK_N": 32} | backward
        )
    if dense.dtype.itemsize > spec.dtype.itemsize:
        return {"BLOCK_N": 32} | (backward if dim > 64 else {})
    return {}


def _with_huge_biases(lse: Tensor, plan: Plan, parts: Parts, seqlen_q: int, seqlen_kv: int) -> Tensor:
    """Correct the lse of rows whose every bias is near finfo.min, which overflows to -inf in base 2.

    Such a bias is so large that scores and the logarithm of a count don't change it: the lse is the largest bias.
    """
    mask = joined_mask(plan.spec, parts, seqlen_q, seqlen_kv, lse.device, pattern=True)
    assert mask is not None
    largest = mask.detach().amax(-1).to(lse.dtype).expand_as(lse)
    overflows = torch.isneginf(lse) & (largest < -_BASE_2) & (largest > float("-inf"))
    return torch.where(overflows, largest, lse)


def _lse_request() -> dict[str, Any]:
    """Return the argument that requests lse: `return_aux` since torch 2.9, `return_lse` before."""
    from torch.nn.attention import flex_attention as module

    if hasattr(module, "AuxRequest"):
        return {"return_aux": module.AuxRequest(lse=True)}
    return {"return_lse": True}


_warned: list[bool] = []


def _first_eager(call: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Any:
    """Run the process's first eager call without torch's warning that it is eager; the decision says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        result = call(query, key, value, **arguments)
    _warned.append(True)
    return result


_turn = threading.RLock()


_not_dynamic: set[tuple[Plan, int | None]] = set()


def _in_turn(kind: Plan, block_mask: int | None, lengths: tuple[int, int, int]) -> Callable[..., Any]:
    """Return compiled code that runs in one thread at a time, since torch can't trace while other threads run it.

    If inductor's C++ for dynamic lengths doesn't compile (torch 2.13 confuses names: ks3 in ks30), the call is compiled
    for its own lengths, and so are later calls of its kind.
    """

    def run(*tensors: Tensor, **arguments: Any) -> Any:
        with _turn:
            if (kind, block_mask) not in _not_dynamic:
                try:
                    return _compiled(kind, block_mask, None)(*tensors, **arguments)
                except Exception as error:
                    if "C++ compile error" not in str(error):
                        raise
                    _not_dynamic.add((kind, block_mask))
            return _compiled(kind, block_mask, lengths)(*tensors, **arguments)

    return run


def _kind(plan: Plan) -> Plan:
    """Return what calls that share compiled code have in common: everything but lengths, which are dynamic."""
    spec = plan.spec.replace(batch=UNKNOWN, seqlen_q=UNKNOWN, seqlen_kv=UNKNOWN, storage=Storage())
    return dataclasses.replace(plan, spec=spec)


@functools.lru_cache(maxsize=128)
def _compiled(kind: Plan, block_mask: int | None, lengths: tuple[int, int, int] | None) -> Callable[..., Any]:
    """Compile a copy of flex_attention for one kind of call, one of the user's block masks, and `lengths` (None: any).

    torch.compile limits recompilations per code object, and beyond the limit silently runs the slow eager path. So
    every kind of call gets its own code object.
    """
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    code = function.__code__.replace(co_name=f"flex_attention_{abs(hash(kind.spec)):x}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    compiled: Callable[..., Any] = torch.compile(copy, fullgraph=True, dynamic=None if lengths is None else False)
    return compiled
