"""From a call, a machine and a wish to a decision: pure, so that every machine can be tried on a laptop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anyattn.backend import Backend
from anyattn.decision import Candidate, Decision, Preference
from anyattn.environment import Environment
from anyattn.names import AUTO, BY_NAME
from anyattn.reasons import Conversion, Reason
from anyattn.registry import not_built
from anyattn.spec import AttentionSpec

AUTO_ORDER: Mapping[str, tuple[str, ...]] = {
    "cuda": ("native", "native_efficient", "flex", "native_math"),
    "cpu": ("native", "flex", "native_math"),
}
"""What `auto` tries, per type of device, where nothing was measured. torch's own pick is first: on an H100 it is the
fastest or near it for short calls, and it is always installed."""

_DEFAULT_ORDER = ("native", "native_math", "flex")
_LOOSER = {"exact": (), "int8": ("int8",), "fp8": ("int8", "fp8")}

NO_FAULTS: Mapping[str, Reason] = {}

Timings = Mapping[str, float]
"""Seconds measured for this call (or its like) per backend name."""


def order(device_type: str, available: Sequence[str], timings: Timings | None) -> tuple[tuple[str, ...], str]:
    """Give the names that `auto` tries, in order, and what the order rests on."""
    fixed = AUTO_ORDER.get(device_type, _DEFAULT_ORDER)
    rest = tuple(name for name in available if name not in fixed and name not in BY_NAME)
    names = (*fixed, *rest)
    if timings:
        measured = sorted((name for name in available if name in timings), key=lambda name: timings[name])
        return (*measured, *(name for name in names if name not in timings)), "measured"
    return names, "fixed order"


def resolve(
    spec: AttentionSpec,
    env: Environment,
    preference: Preference,
    timings: Timings | None,
    candidates: Sequence[tuple[str, Backend | None]],
    *,
    overruled: str = "",
    faults: Mapping[str, Reason] = NO_FAULTS,
) -> Decision:
    """Choose a backend for a call.

    Args:
        spec: The call.
        env: The machine.
        preference: What was asked for, with canonical names.
        timings: Measured seconds per backend, or None.
        candidates: Every known backend with its name; None for one without an adapter.
        overruled: What to report as overruled.
        faults: Backends that failed for this call before, with the reason; lists and `auto` go past them.

    Returns:
        A decision that lists every candidate that was considered, with all the reasons against it. Where
        nothing admits the call, `chosen` is None.
    """
    backends = dict(candidates)
    # What would be downloaded is taken where its own name was given, and never by `auto`, measured or not.
    at_hand = [name for name, found in candidates if found and not found.downloads]
    wanted, basis = _wanted(spec, preference, timings, at_hand)
    exact_only = preference.mode == "prefer"
    limits = preference if exact_only else None
    judged = [_judge(name, backends.get(name), spec, env, limits, faults) for name in wanted]
    chosen = next((candidate.name for candidate in judged if candidate.admits), None)
    others = [
        _judge(name, found, spec, env, None, NO_FAULTS)
        for name, found in candidates
        if name not in {c.name for c in judged}
    ]
    kernel = origin = ""
    conversions: tuple[Conversion, ...] = ()
    if chosen is not None:
        backend = backends[chosen]
        assert backend is not None
        if spec.is_empty:
            kernel = "none: there is nothing to attend to"
        else:
            lowering = backend.lower(spec, env)
            kernel, conversions, origin = lowering.entry, lowering.conversions, backend.origin(env)
    return Decision(spec, chosen, kernel, conversions, preference, basis, (*judged, *others), overruled, origin)


def _wanted(
    spec: AttentionSpec, preference: Preference, timings: Timings | None, available: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    if preference.mode == "require":
        return preference.names, "required"
    names: list[str] = []
    basis = "preferred"
    for name in preference.names:
        if name == AUTO:
            automatic, basis = order(spec.device_type, available, timings)
            names.extend(automatic)
        else:
            names.append(name)
    return tuple(dict.fromkeys(names)), basis


def _judge(
    name: str,
    backend: Backend | None,
    spec: AttentionSpec,
    env: Environment,
    limits: Preference | None,
    faults: Mapping[str, Reason],
) -> Candidate:
    if backend is None:
        return Candidate(name, (not_built(name),))
    reasons = backend.reasons(spec, env)
    caps = backend.capabilities(spec, env)
    if limits is not None and caps is not None and not caps.exact and caps.quantised not in _LOOSER[limits.precision]:
        hint = f"allow it with precision={caps.quantised or 'int8'!r}, or ask for {name} alone"
        reasons = (*reasons, Reason("precision", "an exact kernel", f"one quantised to {caps.quantised}", hint))
    if limits is not None and name in faults:
        reasons = (*reasons, faults[name])
    return Candidate(name, reasons)
