"""Run a decided call; if its kernel fails and a list or `auto` chose it, fall back to the next backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from anyattn.backend.protocol import Output
from anyattn.call.arguments import describe
from anyattn.call.facts import Options, plain_options
from anyattn.call.keys import place_key, tensor_name
from anyattn.call.keys import table_key as make_key
from anyattn.errors import AnyattnWarning, UnsupportedCallError
from anyattn.process import tracing
from anyattn.process.bounded import Bounded
from anyattn.process.tracing import is_plain, is_usual
from anyattn.run import lengths
from anyattn.run.bound import NotForThisCall
from anyattn.run.plan import raise_kernel_error
from anyattn.run.table import Entry, entry_for, entry_under
from anyattn.scopes import defaults
from anyattn.scopes.scopes import Recorder
from anyattn.selection.decide import decide
from anyattn.selection.faults import is_kernels, may_go_on, one_line, outside, passes_over
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason


class Decided(Protocol):
    """A decided call, ready to run."""

    @property
    def decision(self) -> Decision:
        """What was chosen and why."""


Found = TypeVar("Found", bound=Decided)


def first_that_runs(
    decide: Callable[[dict[str, Reason]], Found],
    run: Callable[[Found], Output],
    query: Tensor,
    recorder: Recorder | None = None,
    *,
    usual: bool,
    after: tuple[Exception, Decision] | None = None,
) -> Output:
    """Decide and run a call; if its kernel fails and a list or `auto` chose it, decide again.

    Args:
        decide: Decides the call, and loads the kernel; it gets the backends that failed in this call.
        run: Runs what was decided.
        query: The call's query, whose device a recorder times.
        recorder: Gets the decision that ran, or the last one that failed.
        usual: Whether a failure is recorded as a fault: the backend is then passed over until `anyattn.reset`.
            Otherwise (a tracer, a transform, a tensor subclass) it is passed over in this call only.
        after: An earlier attempt that failed, handled as if it had been made here.

    Raises:
        AnyattnError: As for `attention`; if every backend failed and no fault is recorded, the first one's error.
    """
    failed: dict[str, Reason] = {}
    first: tuple[Exception, Decision] | None = None
    while True:
        if after is None:
            try:
                found = decide(failed)
            except UnsupportedCallError:
                if first is None:
                    raise
                raise_kernel_error(*first)
            decision = found.decision
        else:
            decision = after[1]
        try:
            if after is not None:
                raise after[0]
            start = None if recorder is None else recorder.start(query)
            result = run(found)
        except Exception as error:
            after = None
            kernels = is_kernels(error)
            if kernels and usual and passes_over(error, decision):
                continue
            if kernels and not usual and may_go_on(error, decision):
                first = first or (error, decision)
                failed[str(decision.chosen)] = Reason("fault", "a kernel that runs the call", one_line(error))
                continue
            if recorder is not None:
                recorder(decision)
            if kernels:
                raise_kernel_error(error, decision)
            raise
        if recorder is not None:
            recorder(decision, start)
        _say(failed, decision)
        return result


def call_under(
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    plain: tuple[Any, ...],
) -> Output:
    """Run a call inside a tracer or transform; a backend that fails there is tried again by later calls.

    Raises:
        AnyattnError: As for `attention`.
    """
    options = plain_options(Options(*plain))

    def under(failed: dict[str, Reason]) -> Entry:
        return entry_under(scope, query, key, value, attn_mask, sinks, options, failed)

    def run(entry: Entry) -> Output:
        return entry.run(query, key, value, attn_mask, sinks)

    return first_that_runs(under, run, query, scope.recorder, usual=False)


def call_on(
    error: Exception,
    decision: Decision | None,
    scope: defaults.Scope,
    table_key: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
) -> Output:
    """Continue after a kernel failed: fall back if a list or `auto` chose it, else raise the error.

    Args:
        error: What was raised.
        decision: The decision that failed; None describes and decides the call again.
        scope: The scope in force.
        table_key: The call's key in the table.
        query: As for `attention`.
        key: As for `attention`.
        value: As for `attention`.
        attn_mask: As for `attention`.
        sinks: As for `attention`.
        options: As for `attention`.

    Raises:
        AnyattnError: As for `attention`.
    """
    options = plain_options(options)
    if is_kernels(error) and not is_usual(query, key, value, attn_mask, sinks):
        # The decision may not hold under a tracer or transform, so the call is decided again.
        return call_under(scope, query, key, value, attn_mask, sinks, tuple(options))
    if decision is None:
        # Describing the call also raises if the call itself is wrong.
        decision = decide(describe(query, key, value, attn_mask, sinks, options), scope)

    def again(failed: dict[str, Reason]) -> Entry:
        return entry_for(scope, table_key, query, key, value, attn_mask, sinks, options)

    def run(entry: Entry) -> Output:
        return entry.run(query, key, value, attn_mask, sinks)

    try:
        return first_that_runs(again, run, query, scope.recorder, usual=True, after=(error, decision))
    finally:
        del error  # its traceback refers to this frame, and so to it and the call's tensors


def run_decided(
    scope: defaults.Scope, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, plain: tuple[Any, ...]
) -> Output | None:
    """Run a call in the (batch, heads, sequence, head_dim) layout by the short table; None if it isn't there.

    Args:
        scope: The scope in force.
        query: `(B, H, S_q, D)`.
        key: `(B, H_kv, S_kv, D)`.
        value: `(B, H_kv, S_kv, D_v)`.
        attn_mask: As for `scaled_dot_product_attention`.
        plain: The fields of `Options`, in their order.
    """
    try:
        call: Callable[..., Output] = scope.short[
            attn_mask
            if attn_mask is None
            else tensor_name(attn_mask)
            if type(attn_mask) is Tensor
            else attn_mask.short,
            query.shape,
            key.shape,
            value.shape,
            query.dtype,
            query.is_cpu or place_key(query, key, value),
            plain,
        ]
    except (KeyError, TypeError, AttributeError, RuntimeError):
        return None  # not decided yet, or wrong: the caller describes it, which raises if it is wrong
    try:
        return call(query, key, value) if attn_mask is None else call(query, key, value, attn_mask)
    except Exception as error:
        if not is_kernels(error):
            raise
        return run_after(error, scope, query, key, value, attn_mask, plain)


def run_after(
    error: Exception,
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    plain: tuple[Any, ...],
) -> Output:
    """Continue after a call from the short table failed: the call was wrong, or its kernel raised."""
    try:
        if isinstance(error, NotForThisCall) or not is_usual(query, key, value, attn_mask):
            return run_any(scope, query, key, value, attn_mask, None, plain)
        return call_on(error, None, scope, None, query, key, value, attn_mask, None, Options(*plain))
    finally:
        del error  # its traceback refers to this frame, and so to it and the call's tensors


def run_any(
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    plain: tuple[Any, ...],
) -> Output:
    """Run any call: look it up in the table by everything that its decision depends on, or decide it."""
    mode = None if type(query) is Tensor else tracing.mode_left(query)
    if mode is not None:
        with mode:
            return run_any(scope, query, key, value, attn_mask, sinks, plain)
    table_key: Any = None
    if type(plain[4]) is list:
        plain = (*plain[:4], tuple(plain[4]), *plain[5:])
    try:
        table_key = make_key(query, key, value, attn_mask, sinks, plain)
        entry = scope.table.get(table_key)
        if entry is not None and not entry.in_graphs and tracing.is_captured(query):
            table_key = entry = None
    except (TypeError, AttributeError, RuntimeError):
        # Not tensors, symbolic sizes, or an unhashable option: the call is described, and refused if it is wrong.
        table_key = entry = None
    # SDPA without a mask works under every tracer and transform; all else is decided again there.
    if (entry is None or not entry.traces or attn_mask is not None) and not is_plain():
        return call_under(scope, query, key, value, attn_mask, sinks, plain)
    decision: Decision | None = None
    if entry is None:
        options = plain_options(Options(*plain))
        if list(map(type, plain)) != list(map(type, options)):
            return run_any(scope, query, key, value, attn_mask, sinks, tuple(options))
        by_range = table_key is not None and attn_mask is None and sinks is None and scope.recorder is None
        range_key = lengths.range_key(query, key, value, options) if by_range else None
        entry = lengths.find(scope, range_key, query, key, value, options)
        if entry is None:
            entry = entry_for(scope, table_key, query, key, value, attn_mask, sinks, options)
            decision = entry.decision
            lengths.learn(scope, range_key, entry)
    else:
        decision = entry.decision
    start = None if scope.recorder is None else scope.recorder.start(query)
    try:
        if attn_mask is None and sinks is None:
            result = entry.call(query, key, value)
        else:
            result = entry.call_masked(query, key, value, attn_mask, sinks)
    except Exception as error:  # noqa: BLE001 - call_on raises it again, unless the next backend runs the call
        decided = (decision, scope, table_key)
        return call_on(error, *decided, query, key, value, attn_mask, sinks, Options(*plain))
    if scope.recorder is not None:
        scope.recorder(entry.decision, start)
    return result


_said: Bounded[tuple[str, str], None] = Bounded(256)


def _say(failed: dict[str, Reason], decision: Decision) -> None:
    """Warn once of each backend that failed, and name the one that ran instead."""
    for name, reason in failed.items():
        if not _said.once((name, reason.got)):
            continue
        when = "for tensors of a subclass" if is_plain() else "while a tracer or transform ran"
        text = f"The attention backend {name} failed {when}: {reason.got}."
        text = f"{text} {decision.chosen} ran instead, in this call only."
        warnings.warn(text, AnyattnWarning, stacklevel=outside())
