"""From a call's tensors to its spec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn.call.describe import check_tensors
from anyattn.call.facts import Facts, MaskFacts, Options, all_plain, facts_of, mask_facts, plain_options
from anyattn.call.readers import of_tensors
from anyattn.call.storage import bias_aligned, starts_on_16, storage_facts
from anyattn.errors import InvalidCallError
from anyattn.masks.objects import Mask
from anyattn.masks.values import NOTHING, as_mask, autocast_mask, known_of
from anyattn.process import tracing
from anyattn.types.spec import UNKNOWN, AttentionSpec, Layout, Storage

_grad_enabled = torch.is_grad_enabled
_autocast_on = torch._C._is_any_autocast_enabled
_deterministic = torch._C._get_deterministic_algorithms


def describe(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, options: Options
) -> AttentionSpec:
    """Check a call and return its spec.

    Raises:
        InvalidCallError: If no backend can take the call.
    """
    check_tensors(query, key, value)
    options = plain_options(options)
    if sinks is not None and not isinstance(sinks, Tensor):
        raise InvalidCallError(f"sinks must be a tensor (num_heads,); {type(sinks).__name__} was given.")
    mask = as_mask(attn_mask)
    known = NOTHING
    if mask is not None and (mask.key is not None or mask.dense is not None):
        known = known_of(mask, _kv_length(key, options.layout))
    cast = autocast_dtype(query.device.type)
    if cast is not None and mask is not None:
        mask = autocast_mask(mask, cast)
    records = tracing.records()
    facts = (
        _facts(query, cast, options.layout, records=records),
        _facts(key, cast, options.layout, records=records),
        _facts(value, cast, options.layout, records=records),
    )
    symbolic = UNKNOWN in facts[0].shape or UNKNOWN in facts[1].shape or UNKNOWN in facts[2].shape
    sink_facts = None if sinks is None else facts_of(sinks)
    tensors = (query, key, value, sinks, *(() if mask is None else (mask.key, mask.dense)))
    storage = _storage(query, key, value, options.layout, mask)

    def build(seen: MaskFacts) -> AttentionSpec:
        return of_tensors(
            facts,
            seen,
            options,
            sink_facts,
            tensors,
            storage=storage,
            same_lengths=_same_lengths(query, key, options.layout) if symbolic or records else None,
            compiled=symbolic or records or tracing.is_fake(query),
        )

    if known.all_true:
        build(mask_facts(mask, NOTHING))  # a mask of the wrong shape is refused even if it allows everything
    return build(mask_facts(mask, known))


def _facts(tensor: Tensor, cast: torch.dtype | None, layout: Layout, *, records: bool = False) -> Facts:
    """Return a tensor's facts after autocast; if sizes are symbols, heads and head_dim are made static.

    A recorded graph may run with another batch and other lengths, so those are UNKNOWN, except for 0 and for a batch
    so large that kernels' limits apply.
    """
    facts = facts_of(tensor)
    if records or not all_plain(facts.shape):
        axes = (0, 1) if layout == "BSHD" else (0, 2)
        large = len(facts.shape) == 4 and facts.shape[0] * facts.shape[3 - axes[1]] > _LARGE
        free = (axes[1],) if large else axes
        shape = tuple(
            UNKNOWN if axis in free and (type(n) is not int or (records and n)) else int(n)
            for axis, n in enumerate(facts.shape)
        )
        facts = facts._replace(shape=shape)
    if cast is None or not facts.dtype.is_floating_point or facts.dtype == torch.float64:
        return facts
    return facts._replace(dtype=cast)


_LARGE = 65535
"""The largest batch * heads that every kernel takes."""


def _same_lengths(query: Tensor, key: Tensor, layout: Layout) -> bool:
    """Whether both lengths are the same symbol or the same tensor's, and not just equal now."""
    axis = 1 if layout == "BSHD" else 2
    if query is key:
        return True
    if not query.dim() == key.dim() == 4:
        return False
    mine, other = query.shape[axis], key.shape[axis]
    if not tracing.records():
        return bool(mine == other)
    # make_fx gives sizes that are equal now the same symbol, without a guard; torch.export has guards.
    if type(mine) is int or type(other) is int or not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(mine == other))


def _kv_length(key: Tensor, layout: Layout) -> int:
    if key.dim() != 4:
        return UNKNOWN
    return key.shape[1 if layout == "BSHD" else 2]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return autocast's dtype on a type of device, or None if it is off there."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _storage(query: Tensor, key: Tensor, value: Tensor, layout: Layout, mask: Mask | None) -> Storage:
    # On a CPU nothing depends on storage, and skipping it saves time on every call.
    if query.is_cpu:
        return Storage()
    heads = 2 if layout == "BSHD" else 1
    dense = None if mask is None else mask.dense
    aligned, unit, expanded, masked = storage_facts(query, key, value, heads, dense, starts_on_16)
    tensors = [tensor for tensor in (query, key, value) if tensor.dim() == 4]
    seen = [tensor.transpose(1, 2) if layout == "BSHD" else tensor for tensor in tensors]
    contiguous = all(tensor.is_contiguous() for tensor in seen)
    return Storage(aligned, unit, expanded or tracing.records(), contiguous, masked)


def bias_is_aligned(dense: Tensor) -> bool:
    """Whether a dense mask is boolean (it will be copied) or has aligned rows."""
    return bias_aligned(dense, starts_on_16)
