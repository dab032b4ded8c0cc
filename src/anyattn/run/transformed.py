"""Calls that a tracer or transform makes: described anew, and what fails in one says nothing of plain calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from anyattn.backend.protocol import Output
from anyattn.call.facts import Options, plain_options
from anyattn.errors import AnyattnWarning, UnsupportedCallError
from anyattn.process.bounded import Bounded
from anyattn.process.tracing import is_plain
from anyattn.run.plan import raise_kernel_error
from anyattn.run.table import Entry, entry_under
from anyattn.scopes import defaults
from anyattn.selection.faults import is_kernels, may_go_on, outside, told
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason


def call_under(
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    plain: tuple[Any, ...],
) -> Output:
    """Make a call while a tracer or transform runs.

    Where a list or `auto` chose and a kernel fails, the next one is tried in this call; later calls try it again.

    Raises:
        AnyattnError: As for `attention`.
    """
    options = plain_options(Options(*plain))

    def decide(failed: dict[str, Reason]) -> Entry:
        return entry_under(scope, query, key, value, attn_mask, sinks, options, failed)

    def run(entry: Entry) -> Output:
        if attn_mask is None and sinks is None:
            return entry.call(query, key, value)
        return entry.call_masked(query, key, value, attn_mask, sinks)

    return first_that_runs(scope, decide, run, lambda entry: entry.decision)


def first_that_runs(
    scope: defaults.Scope,
    decide: Callable[[dict[str, Reason]], Any],
    run: Callable[[Any], Output],
    decision_of: Callable[[Any], Decision],
) -> Output:
    """Run what is decided; where a list or `auto` chose, go on past what fails, and note it for this call alone.

    Raises:
        AnyattnError: As for `attention`; where every backend failed, for the first one's error.
    """
    failed: dict[str, Reason] = {}
    first: tuple[Exception, Decision] | None = None
    while True:
        try:
            found = decide(failed)
        except UnsupportedCallError:
            if first is None:
                raise
            raise_kernel_error(*first)
        decision = decision_of(found)
        try:
            result = run(found)
        except Exception as error:
            if is_kernels(error) and may_go_on(error, decision):
                first = first or (error, decision)
                failed[str(decision.chosen)] = Reason("fault", "a kernel that runs the call", told(error))
                continue
            if scope.recorder is not None:
                scope.recorder(decision)
            if is_kernels(error):
                raise_kernel_error(error, decision)
            raise
        if scope.recorder is not None:
            scope.recorder(decision)
        _say(failed, decision)
        return result


_said: Bounded[tuple[str, str], None] = Bounded(256)


def _say(failed: dict[str, Reason], decision: Decision) -> None:
    """Say once of each backend that it failed in a call of that kind, and what ran instead."""
    for name, reason in failed.items():
        if not _said.once((name, reason.got)):
            continue
        when = "for tensors of a subclass" if is_plain() else "while a tracer or transform ran"
        text = f"The attention backend {name} failed {when}: {reason.got}."
        text = f"{text} {decision.chosen} ran instead, in this call alone."
        warnings.warn(text, AnyattnWarning, stacklevel=outside())
