"""Packed sequences: attention over `(T, H, D)`, each sequence by itself, on every backend.

A backend whose kernel takes packed sequences gets them as they are (`host_lengths` where it wants integers). For every
other they are padded on the device, with key lengths for a mask, and the result is packed again: exact, and without
reading a length.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Output, Parts, Plan, Run
from anyattn.call.arguments import autocast_dtype
from anyattn.call.facts import Lengths, Options
from anyattn.call.packed_spec import describe_packed
from anyattn.environment import detect
from anyattn.errors import InvalidCallError
from anyattn.lowering.host_lengths import check_starts
from anyattn.masks import scalars
from anyattn.masks.objects import Mask
from anyattn.pins.pins import live_scope
from anyattn.process import tracing
from anyattn.process.tracing import has_values, is_plain
from anyattn.run.checks import can_check, check_magnitude, check_output
from anyattn.run.packed import run_packed
from anyattn.run.plan import make_plan, raise_kernel_error
from anyattn.run.table import make_first
from anyattn.run.traced_varlen import traced_varlen_call
from anyattn.run.transformed import first_that_runs
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.selection.faults import is_kernels, passes_over
from anyattn.selection.preferences import Backends, scope_of_call
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_current = defaults.current.get
_tracing = torch.compiler.is_dynamo_compiling
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_dynamo_compiling)
_Planned = tuple[Plan, Run, Decision, list[bool]]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backends | None = None,
) -> Any:
    """Compute attention over packed sequences, each of which sees itself alone.

    Args:
        query: `(T_q, H, D)`, all sequences one after the other.
        key: `(T_k, H_kv, D)`, of query's dtype and device.
        value: `(T_k, H_kv, D_v)`, of query's dtype and device.
        cu_seqlens_q: int32 `(B + 1,)` on query's device: where each sequence's queries begin, from 0, and where the
            last one's end. Sequences may be empty. Tokens after the last one's end belong to none: their output is
            zeros, their log-sum-exp that of a row without a key, and they get and give no gradients.
        cu_seqlens_k: The same of keys. Give the same tensor object where the lengths are the same: then both
            alignments are one.
        max_seqlen_q: The largest number of queries of a sequence, or more.
        max_seqlen_k: The largest number of keys of a sequence, or more.
        attn_mask: `masks.Causal` or `masks.SlidingWindow`, applied to each sequence; None is none.
        dropout_p: As for `attention`.
        is_causal: As for `attention`, upper-left in each sequence.
        scale: As for `attention`.
        enable_gqa: As for `attention`.
        window: As for `attention`.
        softcap: As for `attention`.
        sinks: As for `attention`.
        return_lse: As for `attention`.
        backend: As for `attention`.

    Returns:
        `(T_q, H, D_v)` in query's dtype; with `return_lse=True` a pair of it and the log-sum-exp, float32 `(H, T_q)`.

    Raises:
        InvalidCallError: If the call is wrong for any backend. The values of cumulative lengths are checked where that
            needs no synchronisation (on a CPU), where the kernel takes integers (`host_lengths` in the decision: they
            are read on the host, once per tensor), and with the value checks elsewhere.
        AnyattnError: As for `attention`.

    Under torch.compile this call is made outside the compiled graph; torch.export takes it into its own, and the
    lengths that it is given may be others then. Values aren't checked where there are none.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(7, 2, 16)
        >>> starts = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, is_causal=True).shape
        torch.Size([7, 2, 16])
    """
    options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if _tracing() and _exporting():
        return traced_varlen_call(run_packed, query, key, value, lengths, attn_mask, sinks, options, backend)
    return _outside(query, key, value, lengths, attn_mask, sinks, options, backend)


def _outside(*arguments: Any) -> Output:
    return _outside_compiled_code()(*arguments)  # type: ignore[no-any-return]


# The frame itself is left out of compiled code by this attribute, which torch.compiler.disable sets; what it calls is
# disabled when torch._dynamo, whose import takes over a second, is there at all.
_outside._torchdynamo_disable = True  # type: ignore[attr-defined]

_disabled: list[Any] = []


def _outside_compiled_code() -> Any:
    if not _disabled and "torch._dynamo" in sys.modules:
        _disabled.append(torch.compiler.disable(_attend))  # type: ignore[no-untyped-call]
    return _disabled[0] if _disabled else _attend


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    attn_mask: Mask | None,
    sinks: Tensor | None,
    options: Options,
    backend: Backends | None,
) -> Output:
    mode = tracing.mode_left(query)
    if mode is not None:
        with mode:
            return _attend(query, key, value, lengths, attn_mask, sinks, options, backend)
    lengths = (lengths[0], lengths[1], _most("max_seqlen_q", lengths[2]), _most("max_seqlen_k", lengths[3]))
    _check(query, key, value, *lengths)
    if sinks is not None and not isinstance(sinks, Tensor):
        raise InvalidCallError(f"sinks must be a tensor (num_heads,); {type(sinks).__name__} was given.")
    checked = defaults.checks_enabled() and can_check(query, key, value, sinks, *lengths[:2])
    if checked:
        ends = (int(lengths[0][-1]), int(lengths[1][-1]))
        _check_finite(query[: ends[0]], key[: ends[1]], value[: ends[1]])
    scope = live_scope(_current())
    if backend is not None:
        scope = scope_of_call(scope, backend)
    cast = autocast_dtype(query.device.type)
    if cast is not None:
        query, key, value = (_cast(tensor, cast) for tensor in (query, key, value))
    if type(query) is not Tensor or not is_plain():
        under = scope

        def decide(failed: dict[str, Reason]) -> _Planned:
            return _planned(under, query, key, value, lengths, attn_mask, sinks, options, failed)

        def run_found(found: _Planned) -> Output:
            with torch.autocast(query.device.type, enabled=False):
                return run_packed(found[0], found[1], query, key, value, lengths, sinks)

        return first_that_runs(scope, decide, run_found, lambda found: found[2])
    while True:
        plan, run, decision, compared = _planned(scope, query, key, value, lengths, attn_mask, sinks, options)
        caps = _declared(plan) if checked else None
        check_magnitude(value, None if caps is None else caps.value_max)
        try:
            with torch.autocast(query.device.type, enabled=False):
                result = run_packed(plan, run, query, key, value, lengths, sinks)
        except Exception as error:
            kernels = is_kernels(error)
            if kernels and passes_over(error, decision):
                continue
            _record(scope, decision)
            if kernels:
                raise_kernel_error(error, decision)
            raise
        _record(scope, decision)
        if checked and not compared:
            _check_result(plan, decision.spec, query, key, value, lengths, sinks, result)
            compared.append(True)
        return result


def _declared(plan: Plan) -> Capabilities | None:
    backend = registry.get(plan.backend)
    return None if backend is None else backend.capabilities(plan.spec, detect())


def _check_result(
    plan: Plan,
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    sinks: Tensor | None,
    result: Output,
) -> None:
    """Compare the first, the last and the longest sequence that see anything with the reference.

    Raises:
        KernelError: If one leaves the error budget.
    """
    ends = [list(itertools.pairwise(starts.tolist())) for starts in lengths[:2]]
    seen = [pair for pair in zip(*ends, strict=True) if all(stop > start for start, stop in pair)]
    if not seen:
        return
    out, lse = result if isinstance(result, tuple) else (result, None)
    caps = _declared(plan)
    quantised = caps is not None and not caps.exact and bool(caps.quantised)
    for rows, keys in dict.fromkeys((seen[0], seen[-1], max(seen, key=lambda pair: pair[0][1] - pair[0][0]))):
        q, k = slice(*rows), slice(*keys)
        alone = spec.replace(packed=False, batch=1, seqlen_q=rows[1] - rows[0], seqlen_kv=keys[1] - keys[0])
        found = out[None, q] if lse is None else (out[None, q], lse[None, :, q])
        one = dataclasses.replace(plan, spec=alone)
        check_output(one, query[None, q], key[None, k], value[None, k], Parts(sinks=sinks), found, quantised=quantised)


def _record(scope: defaults.Scope, decision: Decision) -> None:
    if scope.recorder is not None:
        scope.recorder(decision)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _check_finite(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidCallError(f"{name} holds NaN or infinity.")


def _check(query: object, key: object, value: object, cu_q: object, cu_k: object, max_q: object, max_k: object) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidCallError(f"{name} must be a tensor (tokens, heads, head_dim); {given} was given.")
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    if key.shape[0] != value.shape[0]:
        raise InvalidCallError(f"key and value need as many tokens; given {key.shape[0]} and {value.shape[0]}.")
    for name, starts, most in (("q", cu_q, max_q), ("k", cu_k, max_k)):
        symbol = isinstance(most, torch.SymInt | Tensor)
        if not symbol and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise InvalidCallError(f"max_seqlen_{name} must be an int >= 0; {most!r} was given.")
        if not isinstance(starts, Tensor) or starts.dim() != 1 or starts.dtype != torch.int32 or not starts.shape[0]:
            given = f"{starts.dtype} {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
            raise InvalidCallError(
                f"cu_seqlens_{name} must be an int32 tensor (batch + 1,) that begins with 0; {given} was given."
            )
        if starts.device != query.device:
            raise InvalidCallError(
                f"cu_seqlens_{name} is on {starts.device}, query on {query.device}; move it there once."
            )
    assert isinstance(cu_q, Tensor)
    assert isinstance(cu_k, Tensor)
    if cu_q.shape != cu_k.shape:
        raise InvalidCallError(
            f"cu_seqlens_q and cu_seqlens_k need one length, batch + 1; given {len(cu_q)} and {len(cu_k)}."
        )
    if (query.is_cpu and has_values(cu_q, cu_k)) or (defaults.checks_enabled() and can_check(cu_q, cu_k)):
        assert isinstance(max_q, int)
        assert isinstance(max_k, int)
        check_starts("q", cu_q.tolist(), max_q, query.shape[0])
        check_starts("k", cu_k.tolist(), max_k, key.shape[0])


def _most(name: str, given: Any) -> Any:
    """Give a largest length as an int; one that a tracer follows stays as it is."""
    if isinstance(given, torch.SymInt) or (isinstance(given, Tensor) and torch._C._get_tracing_state() is not None):
        return given
    return scalars.index(name, given)


def _planned(
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    attn_mask: Mask | None,
    sinks: Tensor | None,
    options: Options,
    failed: dict[str, Reason] | None = None,
) -> _Planned:
    """Find the call in the scope's table, or decide it; the list is empty until its results were compared."""
    base = scope if scope.recorder is None else defaults.scope_for(scope.settings)
    spec = describe_packed(query, key, value, lengths, attn_mask, sinks, options)
    if tracing.is_captured(query):
        spec = spec.replace(captured=True)
    table_key = ("varlen", spec)
    found: _Planned | None = None if failed else base.table.get(table_key)
    if found is None:
        generation = defaults.generation()

        def make(decision: Decision) -> _Planned:
            return (*make_plan(decision), decision, [])

        found = make_first(spec, base, make, failed)
        if not failed and generation == defaults.generation():
            base.remember(table_key, found)
    return found
