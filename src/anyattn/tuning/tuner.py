"""Measuring a call with every backend that `auto` may take for it, and storing what was found."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anyattn.backend.protocol import Output
from anyattn.environment import Environment, detect
from anyattn.errors import AnyattnError, InvalidCallError, InvalidSettingError
from anyattn.run.table import Entry, make_entry
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.selection.choice import choice_of
from anyattn.selection.decide import decision_for
from anyattn.selection.faults import is_kernels, loses_device, one_line
from anyattn.selection.preferences import scope_of_call
from anyattn.timings import known
from anyattn.timings.keys import key_of, sizes_of
from anyattn.timings.store import Row
from anyattn.tuning.gate import error_of
from anyattn.tuning.inputs import Inputs
from anyattn.tuning.timer import Times, can_measure, fewest_runs, first_call, time_calls, undisturbed
from anyattn.types.decision import Decision
from anyattn.types.names import AUTO
from anyattn.types.spec import AttentionSpec

SECONDS = 0.5
"""How long one call is measured by default, all its candidates together; their first calls aren't counted."""


@dataclass(frozen=True)
class Tuned:
    """What measuring one call found.

    Attributes:
        spec: The call.
        before: What `auto` took before; empty if nothing.
        after: What it takes now.
        rows: What was measured, or had been before.
        failed: Backends that couldn't run, each with the error.
        wrong: Backends whose result was wrong, each with its error as a multiple of the budget.
        decision: The decision now.
        measured: Whether it was measured now; else it had been before.
    """

    spec: AttentionSpec
    before: str
    after: str
    rows: tuple[Row, ...]
    decision: Decision
    failed: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True


@dataclass
class Candidate:
    """A backend that is measured: its decided call, and what is known so far."""

    name: str
    kernel: str
    entry: Entry
    call: Callable[[], Any]
    first: float = 0.0
    error: float = 0.0


def candidates(spec: AttentionSpec, scope: defaults.Scope) -> list[str]:
    """Return the backends that `auto` may take for a call, also those that were found wrong before."""
    decision = _auto(spec, scope)
    quick = {name: backend for name, backend in registry.known(registry.names()) if not backend.downloads}
    return [
        candidate.name
        for candidate in decision.candidates
        if candidate.name in quick and all(reason.code == "inexact" for reason in candidate.reasons)
    ]


def measured_before(spec: AttentionSpec, scope: defaults.Scope) -> tuple[Row, ...] | None:
    """Return the measurements of a call, if every backend that may take it has one of its present kernel."""
    env = detect()
    key = key_of(spec, env)
    rows = [] if key is None else [row for row in known.rows_of(key) if row.kernel == _kernel(row.backend, env)]
    names = candidates(spec, scope)
    return tuple(rows) if names and set(names) <= {row.backend for row in rows} else None


def tune(
    spec: AttentionSpec,
    inputs: Inputs,
    scope: defaults.Scope,
    *,
    seconds: float = SECONDS,
    source: str = "anyattn tune",
    names: list[str] | None = None,
    deadline: float | None = None,
) -> Tuned:
    """Measure a call with every backend that `auto` may take for it, and store the results.

    A backend whose result leaves the error budget, compared on these very inputs, is stored as wrong and never timed.

    Args:
        spec: The call, as these inputs are described.
        inputs: What it is called with; gradients are computed if the spec has some.
        scope: The scope in force; its precision says which quantised kernels take part.
        seconds: How long to measure, all backends together, after their first calls.
        source: What is stored as the source.
        names: The backends; None is what `candidates` gives.
        deadline: When to begin no further first call, by `time.perf_counter`; the backends that are left aren't
            measured. The first of `names` is always run. Then `seconds` isn't exceeded for slow calls either: only
            the first backends that fit are timed, and none if there aren't two.

    Raises:
        InvalidCallError: If nothing can be measured now: under torch.compile, a tracer, a transform or graph capture.
        InvalidSettingError: If the value checks are on, which would be measured too.
    """
    if not can_measure(inputs.query, inputs.key, inputs.value, inputs.sinks):
        raise InvalidCallError("Calls are measured in plain eager code alone: not while anything compiles or captures.")
    if defaults.checks_enabled():
        raise InvalidSettingError("The value checks would be measured too: unset ANYATTN_CHECKS for tuning.")
    before = _auto(spec, scope)
    failed: dict[str, str] = {}
    wrong: dict[str, float] = {}
    device = inputs.query.device
    with undisturbed(device):
        ready: list[Candidate] = []
        for name in candidates(spec, scope) if names is None else names:
            if deadline is not None and ready and time.perf_counter() > deadline:
                break
            found = _admitted(name, spec, inputs, scope, failed)
            if found is not None and found.error <= 1:
                ready.append(found)
            elif found is not None:
                wrong[name] = found.error
        if deadline is not None:
            ready = _that_fit(ready, device, seconds)
        captured = [found.name for found in ready if found.entry.in_graphs and not spec.deterministic]
        calls = {found.name: found.call for found in ready}
        times = time_calls(calls, device, budget=seconds, captured=captured) if calls else {}
    env = detect()
    rows = [row for found in ready for row in _rows(spec, env, found, times[found.name], source)]
    rows += [_wrong_row(spec, env, name, error, source) for name, error in wrong.items()]
    known.add(rows)
    after = _auto(spec, scope)
    return Tuned(spec, before.chosen or "", after.chosen or "", tuple(rows), after, failed, wrong)


def _that_fit(ready: list[Candidate], device: torch.device, seconds: float) -> list[Candidate]:
    """Return the first backends that can be timed within a budget."""
    fit: list[Candidate] = []
    left = seconds / fewest_runs(device)
    for found in ready:
        left -= first_call(found.call, device)[0]
        if left < 0:
            break
        fit.append(found)
    return fit if len(fit) > 1 else []


def _auto(spec: AttentionSpec, scope: defaults.Scope) -> Decision:
    return decision_for(spec, scope_of_call(scope, AUTO), detect(), here=True)


def _admitted(
    name: str, spec: AttentionSpec, inputs: Inputs, scope: defaults.Scope, failed: dict[str, str]
) -> Candidate | None:
    """Run a backend for the first time, and compare its result; None if it fails, which is noted."""
    try:
        decision = decision_for(spec, scope_of_call(scope, name), detect(), here=True)
        if decision.chosen is None:
            failed[name] = "; ".join(map(str, decision.reasons(name)))
            return None
        entry = make_entry(decision)
        forward = functools.partial(_forward, entry, inputs, needs_grad=spec.needs_grad)
        seconds, result = first_call(forward, inputs.query.device)
        caps = choice_of(decision).caps
        quantised = caps is not None and not caps.exact and bool(caps.quantised)
        error = error_of(spec, inputs, result, quantised=quantised)  # type: ignore[arg-type]
        call = functools.partial(_both_ways, forward, inputs, spec) if spec.needs_grad else forward
        if spec.needs_grad:
            seconds += first_call(call, inputs.query.device)[0]
    except AnyattnError as refused:
        failed[name] = one_line(refused)
        return None
    except Exception as raised:
        if not is_kernels(raised) or loses_device(raised):
            raise
        failed[name] = one_line(raised)
        return None
    return Candidate(name, _kernel(name, detect()), entry, call, seconds, error)


def _forward(entry: Entry, inputs: Inputs, *, needs_grad: bool) -> Output:
    with torch.set_grad_enabled(needs_grad):
        if inputs.mask is None and inputs.sinks is None:
            return (entry.short or entry.call)(inputs.query, inputs.key, inputs.value)
        return entry.call_masked(*inputs)


def _both_ways(forward: Callable[[], Output], inputs: Inputs, spec: AttentionSpec) -> tuple[Tensor | None, ...]:
    result = forward()
    out = result[0] if isinstance(result, tuple) else result
    named = {**inputs._asdict(), "mask": None if inputs.mask is None else inputs.mask.dense}
    leaves = [named[name] for name in spec.requires_grad]
    return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def _kernel(name: str, env: Environment) -> str:
    return registry.get(name).origin(env)


def _rows(spec: AttentionSpec, env: Environment, found: Candidate, times: Times, source: str) -> list[Row]:
    key = key_of(spec, env)
    if key is None:
        return []
    parts = (found.name, found.kernel, sizes_of(spec))
    both: dict[str, Any] = {"first_call": found.first, "error": found.error, "time": time.time(), "source": source}
    rows = [Row(key._replace(mode="eager"), *parts, times.seconds, times.spread, **both)]
    if times.graph is not None:
        rows.append(Row(key._replace(mode="graph"), *parts, times.graph, times.graph_spread, **both))
    return rows


def _wrong_row(spec: AttentionSpec, env: Environment, name: str, error: float, source: str) -> Row:
    key = key_of(spec, env)
    assert key is not None
    plain = Row(key, name, _kernel(name, env), sizes_of(spec), None, error=error, time=time.time(), source=source)
    return dataclasses.replace(plain, error=min(error, 1e300))  # SQLite has no infinity that JSON could hold
