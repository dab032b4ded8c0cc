"""From a call to its kernel: the table of decided calls, and what happens when a call isn't in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from anyattn import policy, registry, tracing
from anyattn.backend import MaskedRunner, Output
from anyattn.decision import Decision, Precision, Preference
from anyattn.environment import Environment, detect
from anyattn.errors import AnyattnWarning, BackendUnavailableError, InvalidCallError
from anyattn.facts import Options
from anyattn.faults import outside, passes_over, say_passed_over, spec_of_fault
from anyattn.masks import Mask
from anyattn.names import AUTO, BY_NAME
from anyattn.prepare import short_name
from anyattn.reading import autocast_dtype, describe, place_key
from anyattn.reasons import Reason
from anyattn.refusals import refusal
from anyattn.running import Entry, make_entry, raise_kernel_error
from anyattn.selection import NO_FAULTS, Timings, resolve
from anyattn.spec import AttentionSpec

Backends = str | list[str] | tuple[str, ...]
"""A name, an alias, `"auto"`, or a list in order of preference."""

timings_for: Callable[[AttentionSpec, Environment], Timings | None] = lambda spec, env: None  # noqa: E731
"""Where measured times for a call come from; the tuner sets it."""


def entry_for(
    scope: policy.Scope,
    table_key: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
) -> Entry:
    """Decide a call that isn't in the scope's table, and put it there."""
    base = scope if scope.recorder is None else policy.scope_for(scope.settings)
    entry: Entry | None = None
    if scope.recorder is not None and table_key is not None:
        entry = base.table.get(table_key)
    if entry is None or (not entry.in_graphs and tracing.is_captured(query)):
        generation = policy.generation()
        spec = describe(query, key, value, attn_mask, sinks, options)
        if tracing.is_captured(query):
            spec = spec.replace(captured=True)
        cast = autocast_dtype(query.device.type)
        entry = make_first(spec, base, lambda decision: make_entry(decision, cast))
        # What a graph may hold isn't what runs outside of it.
        if table_key is not None and not spec.captured and generation == policy.generation():
            base.remember(table_key, entry)
            if entry.short and sinks is None and type(query) is Tensor:
                _shorten(base, entry, query, key, value, attn_mask, options)
    return entry


Made = TypeVar("Made")


def entry_under(
    scope: policy.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
    failed: dict[str, Reason],
) -> Entry:
    """Decide a call that a tracer or transform makes; it is kept under its spec, which says all that it depends on.

    Args:
        scope: What is asked for.
        query: As for `attention`; likewise what follows.
        key: As for `attention`.
        value: As for `attention`.
        attn_mask: As for `attention`.
        sinks: As for `attention`.
        options: As for `attention`.
        failed: The backends that failed in this very call.
    """
    base = scope if scope.recorder is None else policy.scope_for(scope.settings)
    spec = describe(query, key, value, attn_mask, sinks, options)
    cast = autocast_dtype(query.device.type)
    table_key = ("under", spec, cast)
    entry: Entry | None = None if failed else base.table.get(table_key)
    if entry is None:
        generation = policy.generation()
        entry = make_first(spec, base, lambda decision: make_entry(decision, cast), failed)
        if not failed and generation == policy.generation():
            base.remember(table_key, entry)
    return entry


def make_first(
    spec: AttentionSpec,
    scope: policy.Scope,
    make: Callable[[Decision], Made],
    failed: dict[str, Reason] | None = None,
) -> Made:
    """Decide a call and load its kernel; where a list or `auto` allows it, go on to the next if it can't be loaded.

    `failed` holds what failed in this call alone, under a tracer or transform: it says nothing of other calls.

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
            elif decision.chosen not in policy.broken_loads():
                # Loading notes what it couldn't load, and the next decision goes past it.
                raise
        else:
            if not failed:
                say_passed_over(decision)
            return made


def _shorten(
    scope: policy.Scope, entry: Entry, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, options: Options
) -> None:
    """Put a decided call into the short table as well, where its mask isn't one that must be looked at each time."""
    name: Any = None
    if attn_mask is not None:
        name = short_name(attn_mask, entry.decision.spec.mask)
        if name is None:
            return
    place = query.is_cpu or place_key(query, key, value)
    # As `api.attention` and `api.scaled_dot_product_attention` look it up.
    rest = options[:7] if options.layout == "BSHD" else (tuple(options),)
    short_key = (name, query.shape, key.shape, value.shape, query.dtype, place, *rest)
    runner = entry.call if attn_mask is None else entry.short_masked
    if isinstance(attn_mask, Mask) and attn_mask.pattern is not None and attn_mask.pattern[2] == "lower_right":
        runner = _only_plainly(entry.short_masked)
    scope.short[short_key] = runner


def _only_plainly(run: Any) -> MaskedRunner:
    """Run what takes two lengths for equal only where no graph is recorded, which may run with others."""

    def plainly(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Output:
        if not tracing.is_plain():
            raise LookupError("decided anew while something is traced")
        return run(query, key, value, attn_mask)  # type: ignore[no-any-return]

    return plainly


_preferences: dict[Any, Preference] = {}


def scope_of_call(scope: policy.Scope, backend: Any) -> policy.Scope:
    """Give the scope in which a call with `backend=` runs: the call's wish beats blocks and pins.

    Raises:
        UnknownBackendError: If a name is unknown.
        TypeError: If it is neither a name nor a list of names.
    """
    if isinstance(backend, list):
        backend = tuple(backend)
    calls = scope.base.calls
    found: policy.Scope | None = calls.get(backend)
    if found is None or scope.recorder is not None:
        wish = make_preference(backend, "backend=", scope.settings.precision)
        found = policy.changed(scope, context=wish, override=True)
        # Names of third parties can go again; those of the plan stay.
        if scope.recorder is None and all(name in BY_NAME or name == AUTO for name in wish.names):
            if len(calls) > 1024:
                calls.clear()
            calls[backend] = found
    return found


def make_preference(backend: Any, source: str, precision: Precision = "exact") -> Preference:
    """Turn a name or a list of names into a preference with canonical names.

    Raises:
        UnknownBackendError: If a name is unknown.
        TypeError: If it is neither a name nor a list of names.
        InvalidCallError: If the list is empty, or the precision isn't one.
    """
    if type(backend) is str:
        known = _preferences.get((backend, source, precision))
        if known is not None:
            return known
    if precision not in ("exact", "int8", "fp8", "fp4"):
        raise InvalidCallError(f"precision must be 'exact', 'int8', 'fp8' or 'fp4'; {precision!r} was given.")
    if not isinstance(backend, str | list | tuple):
        raise TypeError(f"A backend is a name or a list of names, not {type(backend).__name__}.")
    key = (tuple(backend) if isinstance(backend, list) else backend, source, precision)
    found = _preferences.get(key)
    if found is None:
        is_list = isinstance(backend, list | tuple)
        names = tuple(backend) if is_list else (backend,)
        if not names:
            raise InvalidCallError("A list of attention backends must name at least one.")
        resolved = tuple(registry.resolve_name(name) for name in names)
        found = policy.preference(resolved, is_list=is_list, source=source, precision=precision)
        if len(_preferences) < 1024 and all(name in BY_NAME or name == AUTO for name in resolved):
            _preferences[key] = found
    return found


def decide(spec: AttentionSpec, scope: policy.Scope, failed: Mapping[str, Reason] | None = None) -> Decision:
    """Choose a backend for a described call under a scope; `failed` are backends that failed in this call alone.

    Raises:
        UnknownBackendError: If a name in force is unknown.
        BackendUnavailableError: If the one backend required can't be used here.
        UnsupportedCallError: If nothing that was allowed admits the call.
    """
    env = detect()
    policy.follow(env.overrides)
    decision = decision_for(spec, scope, env, failed)
    if decision.chosen is None:
        wish = decision.preference
        raise refusal(decision) from policy.load_error(wish.names[0]) if wish.mode == "require" else None
    return decision


def decision_for(
    spec: AttentionSpec, scope: policy.Scope, env: Environment, failed: Mapping[str, Reason] | None = None
) -> Decision:
    """Choose as `decide` does, on any machine, and give the decision even where nothing was chosen."""
    wish = registry.resolve_preference(scope.preference())
    overruled = scope.overruled()
    if overruled and not scope.settings.override:
        _say_once(f"Overruled: {overruled}. Write override=True to have the block beat pins, or change the pin.")
    times = timings_for(spec, env) if AUTO in wish.names else None
    # A third party's package is imported where it is asked for, by name or by auto, and nowhere else.
    known = registry.names() if AUTO in wish.names else registry.built_in_names()
    names = dict.fromkeys((*known, *wish.names))
    known_ones = registry.known(n for n in names if n != AUTO)
    # What failed here says nothing of a machine that is supposed.
    faults = policy.faults(spec_of_fault(spec)) if env is detect() else NO_FAULTS
    if failed:
        faults = {**faults, **failed}
    return resolve(spec, env, wish, times, known_ones, overruled=overruled, faults=faults)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(text, AnyattnWarning, stacklevel=outside())


def explain_failure(
    error: Exception, scope: policy.Scope, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, options: Options
) -> None:
    """Say why a call from the short table failed: it was wrong, or the kernel raised. Returns if the next may try.

    What failed under a tracer or transform, or for a tensor subclass, is decided anew and noted for that call alone.

    Raises:
        AnyattnError: Unless a list or `auto` chose the backend, which then is passed over.
    """
    if not tracing.is_usual(query, key, value, attn_mask):
        return
    spec = describe(query, key, value, attn_mask, None, options)
    decision = decide(spec, scope)
    if not passes_over(error, decision):
        raise_kernel_error(error, decision)
