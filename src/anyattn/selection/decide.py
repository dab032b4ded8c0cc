"""The choice for a described call, under the preference in force."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from anyattn.environment import Environment, detect
from anyattn.errors import AnyattnWarning, UnknownBackendError
from anyattn.process.bounded import Bounded
from anyattn.scopes import defaults
from anyattn.selection import faults, registry
from anyattn.selection.choice import Known
from anyattn.selection.faults import outside, spec_of_fault
from anyattn.selection.refusals import refusal
from anyattn.selection.resolve import NO_FAULTS, resolve
from anyattn.types.decision import Decision
from anyattn.types.names import AUTO
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec
from anyattn.types.timings import Timings


def decide(spec: AttentionSpec, scope: defaults.Scope, failed: Mapping[str, Reason] | None = None) -> Decision:
    """Choose a backend for a described call under a scope; `failed` holds those that failed in this call.

    Raises:
        UnknownBackendError: If a name in force is unknown.
        BackendUnavailableError: If the required backend can't be used here.
        UnsupportedCallError: If no requested backend admits the call.
    """
    env = detect()
    defaults.follow(env.overrides)
    decision = decision_for(spec, scope, env, failed, here=True)
    if decision.chosen is None:
        wish = decision.preference
        raise refusal(decision) from faults.load_error(wish.names[0]) if wish.mode == "require" else None
    return decision


def decision_for(
    spec: AttentionSpec,
    scope: defaults.Scope,
    env: Environment,
    failed: Mapping[str, Reason] | None = None,
    *,
    here: bool,
) -> Decision:
    """Choose as `decide` does, on any machine, and return the decision even if nothing was chosen.

    `here`: whether `env` is this machine; only then do earlier failures count.
    """
    wish = registry.resolve_preference(scope.preference())
    overruled = scope.overruled()
    if overruled and not scope.settings.override:
        _say_once(f"Overruled: {overruled}. Pass override=True to have the block beat pins, or change the pin.")
    # A third party's package is imported only if it is requested, by name or by `auto`.
    known = Known([name for name in wish.names if name != AUTO], third_parties=AUTO in wish.names)
    failures = faults.faults(spec_of_fault(spec)) if here else NO_FAULTS
    if failed:
        failures = {**failures, **failed}
    timings = _timings(spec, env, known, here=here) if AUTO in wish.names else None
    return resolve(spec, env, wish, known, overruled=overruled, faults=failures, timings=timings)


def _timings(spec: AttentionSpec, env: Environment, known: Known, *, here: bool) -> Timings | None:
    """Return what is known of a call's times; the file of measurements is opened only for this."""
    from anyattn.timings.known import timings_of

    def kernel_of(name: str) -> str | None:
        try:
            return known[name].origin(env)
        except UnknownBackendError:
            return None

    return timings_of(spec, env, kernel_of, here=here)


_said: Bounded[str, None] = Bounded(256)


def _say_once(text: str) -> None:
    if _said.once(text):
        warnings.warn(text, AnyattnWarning, stacklevel=outside())
