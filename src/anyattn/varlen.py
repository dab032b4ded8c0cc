"""Packed sequences: attention over `(T, H, D)`, each sequence by itself, on every backend.

A backend whose kernel takes packed sequences gets them as they are (`host_lengths` where it wants integers). For every
other they are padded on the device, with key lengths for a mask, and the result is packed again: exact, and without
reading a length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from anyattn.backend.protocol import Output, Parts, Plan, Run
from anyattn.call.arguments import autocast_dtype
from anyattn.call.facts import Lengths, Options
from anyattn.call.packed_spec import describe_packed
from anyattn.errors import InvalidCallError
from anyattn.masks import scalars
from anyattn.masks.objects import Mask
from anyattn.pins.pins import live_scope
from anyattn.process import tracing
from anyattn.process.tracing import is_plain
from anyattn.run.attempts import first_that_runs
from anyattn.run.checks import can_check, check_magnitude, check_output, check_packed, check_packed_finite
from anyattn.run.packed import run_packed
from anyattn.run.plan import make_plan
from anyattn.run.table import make_first
from anyattn.run.traced.varlen import traced_varlen_call
from anyattn.scopes import defaults
from anyattn.selection.choice import choice_of
from anyattn.selection.preferences import Backends, scope_of_call
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason

_current = defaults.current.get
_tracing = torch.compiler.is_dynamo_compiling
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_dynamo_compiling)


class _Planned(NamedTuple):
    """A decided packed call; `compared` is empty until its results were compared with the reference."""

    plan: Plan
    run: Run
    decision: Decision
    compared: list[bool]


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Mask | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backends | None = ...,
) -> Tensor: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Mask | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backends | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Mask | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    backend: Backends | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
) -> Tensor | tuple[Tensor, Tensor]:
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


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast; devices that have none, such as meta, need nothing."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


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
    check_packed(query, key, value, *lengths)
    if sinks is not None and not isinstance(sinks, Tensor):
        raise InvalidCallError(f"sinks must be a tensor (num_heads,); {type(sinks).__name__} was given.")
    checked = defaults.checks_enabled() and can_check(query, key, value, sinks, *lengths[:2])
    if checked:
        ends = (int(lengths[0][-1]), int(lengths[1][-1]))
        check_packed_finite(query[: ends[0]], key[: ends[1]], value[: ends[1]])
    scope = live_scope(_current())
    if backend is not None:
        scope = scope_of_call(scope, backend)
    cast = autocast_dtype(query.device.type)
    if cast is not None:
        query, key, value = (_cast(tensor, cast) for tensor in (query, key, value))
    usual = type(query) is Tensor and is_plain()
    ran: list[_Planned] = []

    def decide(failed: dict[str, Reason]) -> _Planned:
        return _planned(scope, query, key, value, lengths, attn_mask, sinks, options, failed)

    def run(found: _Planned) -> Output:
        ran[:] = [found]
        caps = choice_of(found.decision).caps if checked else None
        check_magnitude(value, None if caps is None else caps.value_max)
        with _without_autocast(query.device.type):
            return run_packed(found.plan, found.run, query, key, value, lengths, sinks)

    result = first_that_runs(decide, run, query, scope.recorder, usual=usual)
    if checked and not ran[0].compared:
        _check_result(ran[0], query, key, value, lengths, sinks, result)
        ran[0].compared.append(True)
    return result


def _check_result(
    found: _Planned,
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
    caps = choice_of(found.decision).caps
    quantised = caps is not None and not caps.exact and bool(caps.quantised)
    for rows, keys in dict.fromkeys((seen[0], seen[-1], max(seen, key=lambda pair: pair[0][1] - pair[0][0]))):
        q, k = slice(*rows), slice(*keys)
        alone = found.decision.spec.replace(
            packed=False, batch=1, seqlen_q=rows[1] - rows[0], seqlen_kv=keys[1] - keys[0]
        )
        part = out[None, q] if lse is None else (out[None, q], lse[None, :, q])
        one = dataclasses.replace(found.plan, spec=alone)
        check_output(one, query[None, q], key[None, k], value[None, k], Parts(sinks=sinks), part, quantised=quantised)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


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
    """Find the call in the scope's table, or decide it."""
    base = scope if scope.recorder is None else defaults.scope_for(scope.settings)
    spec = describe_packed(query, key, value, lengths, attn_mask, sinks, options)
    if tracing.is_captured(query):
        spec = spec.replace(captured=True)
    table_key = ("varlen", spec)
    found: _Planned | None = None if failed else base.table.get(table_key)
    if found is None:
        generation = defaults.generation()

        def make(decision: Decision) -> _Planned:
            return _Planned(*make_plan(decision), decision, [])

        found = make_first(spec, base, make, failed)
        if not failed and generation == defaults.generation():
            base.remember(table_key, found)
    return found
