"""Packed calls that torch.export traces; see `traced`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.backend.protocol import Output, Plan, Run
from anyattn.call.facts import Facts, MaskFacts, Options
from anyattn.call.readers import of_constants
from anyattn.errors import InvalidCallError
from anyattn.masks.objects import Mask
from anyattn.run.plan import make_plan
from anyattn.run.table import make_first
from anyattn.run.traced import _has_autocast, _pattern, _runs, _size, _static_options, _traced_facts
from anyattn.scopes import _in_force, defaults
from anyattn.selection.preferences import scope_of_call
from anyattn.types.spec import UNKNOWN


def traced_varlen_call(
    run_packed: Callable[..., Output],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
    backend: Any,
) -> Output:
    """Run a packed call while torch.export traces; `run_packed` runs a plan on it."""
    pattern = None
    if attn_mask is not None:
        holds = isinstance(attn_mask, Mask) and attn_mask.pattern is not None
        if not holds or attn_mask.key is not None or attn_mask.dense is not None or attn_mask.block is not None:
            raise InvalidCallError("attn_mask of attention_varlen must be masks.Causal or masks.SlidingWindow.")
        pattern = _pattern(attn_mask)
    if not query.dim() == key.dim() == value.dim() == 3:
        raise InvalidCallError("query, key and value must be tensors (tokens, heads, head_dim).")
    cu_q, cu_k, max_q, max_k = lengths
    kind = query.device.type
    cast = None
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        cast = torch.get_autocast_dtype(kind)
        query, key, value = (t if t.dtype == torch.float64 else t.to(cast) for t in (query, key, value))
    plan: Plan = _choose_packed(
        _in_force.token,
        tuple(_in_force.entered),
        backend,
        (_sized(query), _sized(key), _sized(value)),
        (_traced_facts(cu_q), _traced_facts(cu_k), _size(max_q), _size(max_k)),
        pattern,
        _traced_facts(sinks),
        _static_options(options),
        (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
    )
    run: Run = getattr(_runs, plan.backend)
    with torch.autocast(kind, enabled=False):
        return run_packed(plan, run, query, key, value, lengths, sinks)


def _sized(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape[1], tensor.shape[2], tensor.dtype, tensor.device, tensor.requires_grad)


def _choose_packed(
    token: str,
    entered: tuple[defaults.Entered, ...],
    backend: Any,
    tensors: tuple[tuple[Any, ...], ...],
    lengths: tuple[Any, ...],
    pattern: Any,
    sinks: tuple[Any, ...] | None,
    options_plain: tuple[Any, ...],
    flags: tuple[bool, bool],
) -> Plan:
    scope = defaults.scope_of_token(token, entered)
    if backend is not None:
        scope = scope_of_call(scope, backend)
    _check_starts(lengths, tensors[0][3])
    query, key, value = (
        Facts((UNKNOWN, UNKNOWN, heads, dim), dtype, device, grad) for heads, dim, dtype, device, grad in tensors
    )
    spec = of_constants(
        (query, key, value),
        MaskFacts(pattern),
        Options(*options_plain),
        None if sinks is None else Facts(*sinks),
        flags,
    ).replace(packed=True)
    plan, run = make_first(spec, scope, make_plan)
    setattr(_runs, plan.backend, run)
    return plan


# As in traced.py: what torch.compiler.assume_constant_result does.
_choose_packed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_starts(lengths: tuple[Any, ...], device: torch.device) -> None:
    for name, fact in zip("qk", lengths[:2], strict=True):
        if fact is None or len(fact[0]) != 1 or fact[1] != torch.int32 or fact[2] != device:
            raise InvalidCallError(f"cu_seqlens_{name} must be an int32 tensor (batch + 1,) on query's device.")
