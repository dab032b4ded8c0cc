"""The call of FlexAttention, and the functions that say the call's mask in its terms."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.backend import Output, Parts, Plan
from anyattn.lowering import joined_mask, key_mask, normalise_lse
from anyattn.masks import serial_of
from anyattn.spec import AttentionSpec, PatternSpec

_LARGE = 1 << 26
"""Positions (S_q * S_kv) from which a block mask is made by compiled code on CUDA."""

Mod = Callable[..., Tensor]
"""A `mask_mod(b, h, q_idx, kv_idx)` or `score_mod(score, b, h, q_idx, kv_idx)`."""


def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Call FlexAttention as the plan says; tensors come and go in the spec's layout."""
    from torch.nn.attention.flex_attention import flex_attention

    spec = plan.spec
    call: Callable[..., Any] = flex_attention
    if spec.layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not spec.needs_grad and spec.device_type == "cpu":
        # The CPU refuses inputs that require a gradient even under no_grad.
        query, key, value = query.detach(), key.detach(), value.detach()
    seqlen_kv = key.shape[2]
    if plan.lowering.pad_keys:
        key, value = (F.pad(tensor, (0, 0, 0, -seqlen_kv % 16)) for tensor in (key, value))
    if plan.lowering.compiled and not torch.compiler.is_compiling():
        call = _compiled(plan, None if parts.block is None else serial_of(parts.block))
    with_lse = spec.return_lse or spec.sinks
    arguments: dict[str, Any] = {
        "score_mod": _score_mod(spec, parts, seqlen_kv),
        "block_mask": _block_mask(plan, parts, query, key, seqlen_kv),
        "scale": spec.scale,
        "enable_gqa": spec.is_gqa,
    }
    if with_lse:
        arguments |= _lse_request()
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
    if parts.dense is not None and parts.dense.is_floating_point():
        lse = _with_huge_biases(lse, plan, parts, query.shape[2], seqlen_kv)
    return out, lse


def _with_huge_biases(lse: Tensor, plan: Plan, parts: Parts, seqlen_q: int, seqlen_kv: int) -> Tensor:
    """Mend the lse of rows whose every bias is near finfo.min, which overflows to -inf in base 2.

    Beside such a bias a score, and the logarithm of a count, are below the last place: the lse is the largest bias.
    """
    mask = joined_mask(plan.spec, parts, seqlen_q, seqlen_kv, lse.device, pattern=True)
    assert mask is not None
    largest = mask.detach().amax(-1).to(lse.dtype).expand_as(lse)
    return torch.where(torch.isneginf(lse), largest, lse)


def _lse_request() -> dict[str, Any]:
    """Ask for lse in the way that this torch knows: `return_aux` since 2.9, `return_lse` before."""
    from torch.nn.attention import flex_attention as module

    if hasattr(module, "AuxRequest"):
        return {"return_aux": module.AuxRequest(lse=True)}
    return {"return_lse": True}


_warned: list[bool] = []


def _first_eager(call: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Any:
    """Run the process's first eager call without torch's one warning that it is eager: the decision says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        result = call(query, key, value, **arguments)
    _warned.append(True)
    return result


@functools.lru_cache(maxsize=128)
def _compiled(plan: Plan, block_mask: int | None) -> Callable[..., Any]:
    """Compile a copy of flex_attention for one kind of call, and one block mask of the caller's.

    torch.compile counts recompilations per code object and beyond its limit silently runs the slow eager
    path, so every kind of call gets a code object of its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    code = function.__code__.replace(co_name=f"flex_attention_{abs(hash(plan.spec)):x}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    compiled: Callable[..., Any] = torch.compile(copy, fullgraph=True)
    return compiled


def _score_mod(spec: AttentionSpec, parts: Parts, seqlen_kv: int) -> Mod | None:
    """Make the function that changes scores: softcap, then a dense mask."""
    cap, dense = spec.softcap, parts.dense
    if dense is None:
        if cap is None:
            return None
        return lambda score, b, h, q, kv: cap * torch.tanh(score / cap)
    full = [size > 1 for size in dense.shape]
    boolean = dense.dtype == torch.bool
    last = seqlen_kv - 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        inside = torch.where(kv > last, last, kv)  # padded keys are masked, whatever is read for them
        index = [i if whole else i * 0 for i, whole in zip((b, h, q, inside), full, strict=True)]
        found = dense[index[0], index[1], index[2], index[3]]
        return torch.where(found, score, float("-inf")) if boolean else score + found

    return score_mod


def _block_mask(plan: Plan, parts: Parts, query: Tensor, key: Tensor, seqlen_kv: int) -> Any:
    """Make the block mask of a pattern, a key mask and padding, joined with the caller's."""
    spec, given = plan.spec, parts.block
    block = spec.mask.block
    alone = given is None and parts.key is None and not plan.lowering.pad_keys
    if alone and spec.mask.pattern is not None and not torch.compiler.is_compiling():
        return _pattern_block_mask(spec.mask.pattern, query.shape[2], seqlen_kv, query.device)
    mask_mod = _mask_mod(plan, parts, query.shape[2], seqlen_kv)
    if given is None and mask_mod is None:
        return None
    if given is not None and block is not None:
        if mask_mod is None and plan.lowering.compiled and not block.is_partial:
            return given
        theirs = given.mask_mod if block.is_partial else _with_blocks(given)
        mask_mod = theirs if mask_mod is None else _both(mask_mod, theirs)
    assert mask_mod is not None
    per_batch = parts.key is not None or (block is not None and (block.per_batch or block.batch > 1))
    per_head = block is not None and (block.per_head or block.heads > 1)
    batch, heads = query.shape[0] if per_batch else None, query.shape[1] if per_head else None
    return _create(mask_mod, batch, heads, query.shape[2], key.shape[2], query.device)


_patterns: dict[tuple[PatternSpec, int, int, torch.device], Any] = {}


def _pattern_block_mask(pattern: PatternSpec, seqlen_q: int, seqlen_kv: int, device: torch.device) -> Any:
    """Make the block mask of a pattern alone, once per shape and device: making one reads every position."""
    key = (pattern, seqlen_q, seqlen_kv, device)
    found = _patterns.get(key)
    if found is not None:
        return found
    # Tensors born in inference mode or inside a CUDA graph must not be met outside again.
    with torch.inference_mode(False), torch.no_grad():
        made = _create(_pattern_mod(pattern, seqlen_q, seqlen_kv), None, None, seqlen_q, seqlen_kv, device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        if len(_patterns) >= 64:
            _patterns.clear()
        _patterns[key] = made
    return made


def _create(
    mask_mod: Mod, batch: int | None, heads: int | None, seqlen_q: int, seqlen_kv: int, device: torch.device
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    options: dict[str, Any] = {"device": device}
    if device.type == "cuda" and not torch.compiler.is_compiling() and seqlen_q * seqlen_kv > _LARGE:
        options["_compile"] = True  # otherwise every position is written out
    return create_block_mask(mask_mod, batch, heads, seqlen_q, seqlen_kv, **options)


def _with_blocks(block_mask: Any) -> Mod:
    """Join a block mask's function with its blocks, which eager FlexAttention ignores."""
    blocks = block_mask.to_dense() != 0
    rows, columns = block_mask.BLOCK_SIZE
    batch, heads = blocks.shape[0] > 1, blocks.shape[1] > 1
    function = block_mask.mask_mod

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found = blocks[b if batch else b * 0, h if heads else h * 0, q // rows, kv // columns]
        inside: Tensor = found & function(b, h, q, kv)
        return inside

    return mask_mod


def _mask_mod(plan: Plan, parts: Parts, seqlen_q: int, seqlen_kv: int) -> Mod | None:
    """Make the function of a pattern, a key mask and padded keys."""
    pattern = plan.spec.mask.pattern
    inside = None if pattern is None else _pattern_mod(pattern, seqlen_q, seqlen_kv)
    keys = None if parts.key is None else key_mask(parts.key, seqlen_kv)[:, 0, 0]
    padded = plan.lowering.pad_keys
    if pattern is None and keys is None and not padded:
        return None
    if keys is not None and padded:
        keys = F.pad(keys, (0, -seqlen_kv % 16))

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = kv < seqlen_kv
        if inside is not None:
            allowed = allowed & inside(b, h, q, kv)
        if keys is not None:
            allowed = allowed & keys[b, kv]
        return allowed

    return mask_mod


def _pattern_mod(pattern: PatternSpec, seqlen_q: int, seqlen_kv: int) -> Mod:
    left, right = pattern.left, pattern.right
    offset = seqlen_kv - seqlen_q if pattern.align == "lower_right" else 0

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if left == -1:
            return kv <= q + offset + right
        if right == -1:
            return kv >= q + offset - left
        return (kv <= q + offset + right) & (kv >= q + offset - left)

    return mask_mod


def _both(first: Mod, second: Mod) -> Mod:
    return lambda b, h, q, kv: first(b, h, q, kv) & second(b, h, q, kv)
