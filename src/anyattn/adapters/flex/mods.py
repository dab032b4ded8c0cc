"""A call's mask for FlexAttention: functions of indices, and block masks made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.adapters.flex import traced
from anyattn.adapters.flex.huge import with_bias
from anyattn.backend.protocol import Parts, Plan
from anyattn.lowering.dense import key_mask
from anyattn.masks import block_masks
from anyattn.masks.base import serial_of
from anyattn.masks.block_masks import make_band_block_mask
from anyattn.masks.functions import MaskFunction
from anyattn.process.bounded import Bounded
from anyattn.process.tracing import has_values, is_fake, is_plain
from anyattn.types.spec import AttentionSpec, PatternSpec

Mod = Callable[..., Tensor]
"""A `mask_mod(b, h, q_idx, kv_idx)` or `score_mod(score, b, h, q_idx, kv_idx)`."""


def score_mod_of(spec: AttentionSpec, parts: Parts, padded_from: int | None) -> Mod | None:
    """Make the score_mod: softcap, then a dense mask."""
    cap, dense = spec.softcap, parts.dense
    if dense is None:
        if cap is None:
            return None
        return lambda score, b, h, q, kv: cap * torch.tanh(score / cap)
    full = [size > 1 for size in dense.shape]
    boolean = dense.dtype == torch.bool
    base_2 = spec.device_type == "cuda" and dense.dtype in (torch.bfloat16, torch.float32)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        index = [i if whole else i * 0 for i, whole in zip((b, h, q, _within(kv, padded_from)), full, strict=True)]
        found = dense[index[0], index[1], index[2], index[3]]
        if boolean:
            return torch.where(found, score, float("-inf"))
        return with_bias(score, found) if base_2 else score + found

    return score_mod


def _within(kv: Tensor, padded_from: int | None) -> Tensor:
    """Clamp a padded key's index to the user's keys; the key is masked, so any value will do."""
    return kv if padded_from is None else torch.where(kv >= padded_from, padded_from - 1, kv)


def block_mask_of(plan: Plan, parts: Parts, query: Tensor, key: Tensor, seqlen_kv: int) -> Any:
    """Make the block mask of a pattern, a key mask and padding, joined with the user's."""
    spec, given = plan.spec, parts.block
    block = spec.mask.block
    if parts.key is not None and torch.compiler.is_compiling():
        # Dynamo before torch 2.9 traces no NamedTuple's _replace.
        keys = torch.ops.anyattn.flex_keys(parts.key, seqlen_kv, key.shape[2])
        parts = Parts(keys, parts.dense, parts.block, parts.sinks)
    if isinstance(given, MaskFunction):
        return _function_block_mask(plan, parts, given, query, key, seqlen_kv)
    eager = parts.key is None and not plan.lowering.pad_keys and not torch.compiler.is_compiling()
    if eager and given is None and spec.mask.pattern is not None:
        return _pattern_block_mask(plan, parts, query, key, seqlen_kv)
    name: Any = None
    if eager and given is not None and _is_real(query):
        name = (serial_of(given), spec.mask.pattern, plan.lowering.compiled, query.shape[:3], seqlen_kv)
        if name in _patterns:
            return _patterns[name]
    mask_mod = _mask_mod(plan, parts, query.shape[2], seqlen_kv)
    if given is None:
        return None if mask_mod is None else _band_block_mask(plan, parts, mask_mod, query, key, seqlen_kv)
    assert block is not None
    if mask_mod is None and plan.lowering.compiled and not block.is_partial:
        return given
    theirs = given.mask_mod if block.is_partial else _with_blocks(given)
    mask_mod = _both(mask_mod, theirs, seqlen_kv if plan.lowering.pad_keys else None)
    per_batch = parts.key is not None or block.per_batch or block.batch > 1
    per_head = block.per_head or block.heads > 1
    batch, heads = query.shape[0] if per_batch else None, query.shape[1] if per_head else None
    make_block_mask = traced.function_block_mask if torch.compiler.is_compiling() else block_masks.make_block_mask
    made = make_block_mask(mask_mod, batch, heads, query.shape[2], key.shape[2], query.device)
    if name is not None and not torch.is_inference_mode_enabled():
        _cache(name, made, query.device)
    return made


def _function_block_mask(
    plan: Plan, parts: Parts, function: MaskFunction, query: Tensor, key: Tensor, seqlen_kv: int
) -> Any:
    """Make the block mask of a mask function joined with other masks; cached with the function unless a key mask is."""
    batch = query.shape[0] if parts.key is not None or function.per_batch else None
    heads = query.shape[1] if function.per_head else None
    seqlen_q, padded = query.shape[2], plan.lowering.pad_keys

    def make() -> Any:
        first = _mask_mod(plan, parts, seqlen_q, seqlen_kv)
        mask_mod = _both(first, function.mask_mod, seqlen_kv if padded else None)
        make_block_mask = traced.function_block_mask if torch.compiler.is_compiling() else block_masks.make_block_mask
        return make_block_mask(mask_mod, batch, heads, seqlen_q, key.shape[2], query.device)

    if parts.key is not None or torch.compiler.is_compiling():
        return make()
    name = ("block", plan.spec.mask.pattern, batch, heads, seqlen_q, seqlen_kv, key.shape[2])
    return function.cached(name, query.device, make)


_patterns: Bounded[Any, Any] = Bounded(64)


def _pattern_block_mask(plan: Plan, parts: Parts, query: Tensor, key: Tensor, seqlen_kv: int) -> Any:
    """Make the block mask of a pattern without other masks, once per shape and device."""
    name = (plan.spec.mask.pattern, query.shape[2], seqlen_kv, query.device)
    found = _patterns.get(name) if _is_real(query) else None
    if found is not None:
        return found
    mask_mod = _mask_mod(plan, parts, query.shape[2], seqlen_kv)
    assert mask_mod is not None
    # Tensors made in inference mode can't be used outside it.
    with torch.inference_mode(False), torch.no_grad():
        made = _band_block_mask(plan, parts, mask_mod, query, key, seqlen_kv)
    _cache(name, made, query.device)
    return made


def _band_block_mask(plan: Plan, parts: Parts, mask_mod: Mod, query: Tensor, key: Tensor, seqlen_kv: int) -> Any:
    """Make the block mask of a pattern, a key mask and padded keys, from the bounds of their blocks."""
    pattern, seqlen_q, padded = plan.spec.mask.pattern, query.shape[2], key.shape[2]
    low, high = (None, None) if pattern is None else _bounds(pattern, seqlen_q, seqlen_kv)
    if parts.key is not None and torch.compiler.is_compiling():
        return traced.band_block_mask(mask_mod, parts.key, low, high, seqlen_q)
    keys = None if parts.key is None else key_mask(parts.key, seqlen_kv)[:, 0, 0]
    if keys is None and plan.lowering.pad_keys:
        keys = torch.arange(padded, device=query.device)[None] < seqlen_kv
    elif keys is not None:
        keys = F.pad(keys, (0, padded - seqlen_kv))
    return make_band_block_mask(mask_mod, seqlen_q, padded, query.device, low=low, high=high, keys=keys)


def _is_real(query: Tensor) -> bool:
    """Whether a block mask made of real tensors may be used with a query; in a CUDA graph it may."""
    return is_plain() and not is_fake(query)


def _cache(key: Any, made: Any, device: torch.device) -> None:
    """Cache a block mask, unless it belongs to a trace or to a CUDA graph being captured."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or not has_values(made.kv_num_blocks):
        return
    _patterns[key] = made


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
    pattern = plan.spec.mask.pattern
    inside = None if pattern is None else _pattern_mod(pattern, seqlen_q, seqlen_kv)
    allowed_key = None if parts.key is None else _key_mod(parts.key, seqlen_kv, padded=plan.lowering.pad_keys)
    padded = plan.lowering.pad_keys
    if inside is None and allowed_key is None and not padded:
        return None

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = kv < seqlen_kv if padded else kv >= 0
        if inside is not None:
            allowed = allowed & inside(b, h, q, kv)
        if allowed_key is not None:
            allowed = allowed & allowed_key(b, h, q, kv)
        return allowed

    return mask_mod


def _key_mod(key: Tensor, seqlen_kv: int, *, padded: bool) -> Mod:
    """Make the function of a key mask; lengths are compared in it, without a mask tensor."""
    if key.dtype != torch.bool:
        return lambda b, h, q, kv: kv < key[b]
    keys = key.squeeze(1).squeeze(1) if key.dim() == 4 else key
    per_batch = keys.shape[0] > 1
    if padded and not torch.compiler.is_compiling():
        keys = F.pad(keys, (0, -seqlen_kv % 16))
    return lambda b, h, q, kv: keys[b if per_batch else b * 0, kv]


def _bounds(pattern: PatternSpec, seqlen_q: int, seqlen_kv: int) -> tuple[int | None, int | None]:
    """Return the least and the largest `column - row` that a pattern allows; None is unbounded."""
    offset = seqlen_kv - seqlen_q if pattern.align == "lower_right" else 0
    low = None if pattern.left == -1 else offset - pattern.left
    return low, None if pattern.right == -1 else offset + pattern.right


def _pattern_mod(pattern: PatternSpec, seqlen_q: int, seqlen_kv: int) -> Mod:
    low, high = _bounds(pattern, seqlen_q, seqlen_kv)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = kv >= 0 if low is None else kv >= q + low
        return allowed if high is None else allowed & (kv <= q + high)

    return mask_mod


def _both(first: Mod | None, theirs: Mod, padded_from: int | None) -> Mod:
    if first is None:
        return theirs
    return lambda b, h, q, kv: first(b, h, q, kv) & theirs(b, h, q, _within(kv, padded_from))
