"""The cache of decided calls: a repeated call runs without being described or decided again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyattn.backend.protocol import MaskedRunner, Output, Parts, Runner
from anyattn.call.arguments import autocast_dtype, describe
from anyattn.call.facts import Options
from anyattn.call.keys import place_key, short_name
from anyattn.errors import BackendUnavailableError
from anyattn.masks.objects import Mask
from anyattn.masks.values import as_mask, autocast_mask, parts_of
from anyattn.process import tracing
from anyattn.run import bound
from anyattn.run.checks import can_check, check_inputs, check_output
from anyattn.run.first import tune_first
from anyattn.run.plan import execute, make_plan
from anyattn.scopes import defaults
from anyattn.selection import faults
from anyattn.selection.choice import Choice, choice_of
from anyattn.selection.decide import decide
from anyattn.selection.faults import say_passed_over
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec


class Entry:
    """A decided call.

    Attributes:
        call: `call(query, key, value)` for a call without mask and sinks.
        call_masked: `call_masked(query, key, value, attn_mask, sinks)`.
        decision: What was chosen and why.
        short: What runs a call without mask from the short table, whose key lacks dtypes and devices of key and value;
            None if the table has no such call.
        short_masked: The same with a mask: `short_masked(query, key, value, attn_mask)`.
        traces: Whether `call` may run inside tracers and transforms; if not, calls are decided again there.
        in_graphs: Whether the call may be captured in a CUDA graph; if not, it is decided again there.
    """

    __slots__ = ("call", "call_masked", "decision", "in_graphs", "short", "short_masked", "traces")

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Tensor], Output],
        call_masked: Callable[[Tensor, Tensor, Tensor, Any, Tensor | None], Output],
        decision: Decision,
        short: Runner | None,
        short_masked: MaskedRunner | None = None,
        traces: bool = False,
        in_graphs: bool = True,
    ) -> None:
        self.call = call
        self.call_masked = call_masked
        self.decision = decision
        self.short = short
        self.short_masked = short_masked
        self.traces = traces
        self.in_graphs = in_graphs

    def run(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None) -> Output:
        """Run the call, with or without a mask and sinks."""
        if attn_mask is None and sinks is None:
            return self.call(query, key, value)
        return self.call_masked(query, key, value, attn_mask, sinks)

    @property
    def gives_gradients(self) -> bool:
        """Whether the chosen backend has a backward on the call's device."""
        caps = choice_of(self.decision).caps
        return caps is not None and caps.backward


def make_entry(decision: Decision, cast: torch.dtype | None = None) -> Entry:
    """Bind a decision to its kernel."""
    plan, run = make_plan(decision)
    choice = choice_of(decision)

    def call_masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None) -> Output:
        parts = _without_full_masks(plan.spec, parts_of(as_mask(attn_mask), sinks))
        return execute(run, plan, query, key, value, parts)

    nothing = Parts()

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Output:
        return run(plan, query, key, value, nothing)

    call: Runner = whole
    masked, short, short_masked = call_masked, *bound.bound_runners(choice)
    traces = short is not None and choice.backend.bound_traces
    if short is not None:
        call = short if traces else bound.plainly(short, whole)
    if short_masked is not None:
        masked = bound.masked_plainly(short_masked, None if choice.backend.bound_traces else call_masked)
    in_graphs = decision.spec.is_empty or (choice.caps is not None and choice.caps.cuda_graph)
    if cast is not None:
        call, masked = _autocast(call, masked, cast, plan.spec.device_type)
    if defaults.checks_enabled():
        call, masked = _checked(masked, choice)
    if cast is not None or defaults.checks_enabled():
        short = short_masked = None
        traces = False
    elif not (choice.backend.bound_traces and in_graphs):
        short = bound.guarded(short, plan.spec, in_graphs=in_graphs)
        short_masked = bound.guarded(short_masked, plan.spec, in_graphs=in_graphs)
    return Entry(call, masked, decision, short, short_masked, traces, in_graphs)


def _without_full_masks(spec: AttentionSpec, parts: Parts) -> Parts:
    """Drop mask tensors known to allow everything; the spec has none then."""
    mask = spec.mask
    if mask.key is None and mask.dense is None and (parts.key is not None or parts.dense is not None):
        return parts._replace(key=None, dense=None)
    return parts


def _autocast(call: Any, call_masked: Any, dtype: torch.dtype, device_type: str) -> tuple[Any, Any]:
    """Cast as autocast does for SDPA, and run with autocast off, which would cast the mask too."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    def cast_call(query: Tensor, key: Tensor, value: Tensor) -> Output:
        with torch.autocast(device_type, enabled=False):
            return call(cast(query), cast(key), cast(value))  # type: ignore[no-any-return]

    def cast_call_masked(query: Tensor, key: Tensor, value: Tensor, mask: Any, sinks: Tensor | None) -> Output:
        with torch.autocast(device_type, enabled=False):
            mask = autocast_mask(as_mask(mask), dtype)
            return call_masked(cast(query), cast(key), cast(value), mask, sinks)  # type: ignore[no-any-return]

    return cast_call, cast_call_masked


def _checked(call_masked: Any, choice: Choice) -> tuple[Any, Any]:
    """Add the value checks: inputs at every call, the output against the reference at the first."""
    first = [True]
    plan, caps = choice.plan, choice.caps
    value_max = None if caps is None else caps.value_max
    quantised = caps is not None and not caps.exact and bool(caps.quantised)

    def checked(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, sinks: Tensor | None = None) -> Output:
        parts = _without_full_masks(plan.spec, parts_of(as_mask(mask), sinks))
        if not can_check(query, key, value, parts.key, parts.dense, sinks):
            return call_masked(query, key, value, mask, sinks)  # type: ignore[no-any-return]
        check_inputs(plan.spec, query, key, value, parts, value_max)
        result: Output = call_masked(query, key, value, mask, sinks)
        if first[0]:
            check_output(plan, query, key, value, parts, result, quantised=quantised)
            first[0] = False
        return result

    return checked, checked


def entry_for(
    scope: defaults.Scope,
    table_key: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
) -> Entry:
    """Decide a call that isn't in the scope's table, and put it there."""
    base = scope if scope.recorder is None else defaults.scope_for(scope.settings)
    entry: Entry | None = None
    if scope.recorder is not None and table_key is not None:
        entry = base.table.get(table_key)
    if entry is None or (not entry.in_graphs and tracing.is_captured(query)):
        generation = defaults.generation()
        spec = describe(query, key, value, attn_mask, sinks, options)
        if tracing.is_captured(query):
            spec = spec.replace(captured=True)
        cast = autocast_dtype(query.device.type)
        if cast is None:
            tune_first(spec, base, query, key, value, attn_mask, sinks)
        entry = make_first(spec, base, lambda decision: make_entry(decision, cast))
        # A decision for a captured graph may differ from the one outside it.
        if table_key is not None and not spec.captured and generation == defaults.generation():
            base.remember(table_key, entry)
            if sinks is None and type(query) is Tensor:
                shorten(base, entry, query, key, value, attn_mask, options)
    return entry


Made = TypeVar("Made")


def entry_under(
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
    failed: dict[str, Reason],
) -> Entry:
    """Decide a call inside a tracer or transform; it is cached by its spec.

    Args:
        scope: The scope in force.
        query: As for `attention`.
        key: As for `attention`.
        value: As for `attention`.
        attn_mask: As for `attention`.
        sinks: As for `attention`.
        options: As for `attention`.
        failed: The backends that failed in this call.
    """
    base = scope if scope.recorder is None else defaults.scope_for(scope.settings)
    spec = describe(query, key, value, attn_mask, sinks, options)
    cast = autocast_dtype(query.device.type)
    table_key = ("under", spec, cast, tracing.exports_onnx())
    entry: Entry | None = None if failed else base.table.get(table_key)
    if entry is None:
        generation = defaults.generation()
        entry = make_first(spec, base, lambda decision: make_entry(decision, cast), failed)
        if not failed and generation == defaults.generation():
            base.remember(table_key, entry)
    return entry


def make_first(
    spec: AttentionSpec,
    scope: defaults.Scope,
    make: Callable[[Decision], Made],
    failed: dict[str, Reason] | None = None,
) -> Made:
    """Decide a call and load its kernel; if loading fails and a list or `auto` chose it, decide again.

    `failed` holds the backends that failed in this call only, under a tracer or transform.

    Raises:
        AnyattnError: As `decide` and `make`.
    """
    while True:
        decision = decide(spec, scope, failed)
        try:
            made = make(decision)
        except BackendUnavailableError as error:
            if decision.preference.mode == "require" or decision.chosen is None:
                raise
            if failed is not None and not tracing.is_plain():
                failed[decision.chosen] = error.reasons[0]
            elif decision.chosen not in faults.broken_loads():
                # A failed load is recorded, and then the next decision passes over the backend; this one wasn't.
                raise
        else:
            if not failed:
                say_passed_over(decision)
            return made


def shorten(
    scope: defaults.Scope, entry: Entry, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, options: Options
) -> None:
    """Put a decided call into the short table too, unless its mask must be described at each call."""
    name: Any = None
    if attn_mask is not None:
        name = short_name(attn_mask, entry.decision.spec.mask)
        if name is None:
            return
    place = query.is_cpu or place_key(query, key, value)
    # The key that `api.attention` and `api.scaled_dot_product_attention` make.
    rest = options[:7] if options.layout == "BSHD" else (tuple(options),)
    short_key = (name, query.shape, key.shape, value.shape, query.dtype, place, *rest)
    runner: Callable[..., Output] | None = entry.short if attn_mask is None else entry.short_masked
    if runner is None:
        return
    if isinstance(attn_mask, Mask) and attn_mask.pattern is not None and attn_mask.pattern[2] == "lower_right":
        runner = bound.only_plainly(runner)
    scope.short[short_key] = runner
