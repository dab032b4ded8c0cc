"""The environment variables that steer anyattn, and what is wrong with those that are set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from anyattn.errors import InvalidSettingError, UnknownBackendError
from anyattn.policy.policy import ENV_POLICY, Policy
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.sources.hub import malformed
from anyattn.types.names import AUTO

CHOOSING = (defaults.ENV_BACKEND, defaults.ENV_BACKEND_DIFFUSERS)
CHECKING = (defaults.ENV_CHECKS, defaults.ENV_CHECKS_DIFFUSERS)

LOCAL_KERNELS = "LOCAL_KERNELS"

State = Literal["in force", "overruled", "no effect", "wrong"]


@dataclass(frozen=True, slots=True)
class VariableReport:
    """One variable that is set.

    Attributes:
        name: Its name.
        value: What it holds.
        state: Whether it decides; `"wrong"` if its value has no meaning.
        note: What that means.
        nearest: What was perhaps meant, the likeliest first.
    """

    name: str
    value: str
    state: State
    note: str = ""
    nearest: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {**asdict(self), "nearest": list(self.nearest)}


def variables(environ: Mapping[str, str]) -> tuple[VariableReport, ...]:
    """Look at every variable that is set and is anyattn's, or looks as if it were meant for it."""
    decides = defaults.from_environment(environ).source
    rows = [_choosing(name, environ[name], decides) for name in CHOOSING if name in environ]
    rows += [_checking(name, environ[name]) for name in CHECKING if name in environ]
    if ENV_POLICY in environ:
        rows.append(_policy(environ[ENV_POLICY]))
    if LOCAL_KERNELS in environ:
        rows.append(_local_kernels(environ[LOCAL_KERNELS]))
    known = (*CHOOSING, *CHECKING, ENV_POLICY)
    for name, value in sorted(environ.items()):
        if name in known or not name.upper().startswith(("ANYATTN", "DIFFUSERS_ATTN")):
            continue
        close = tuple(difflib.get_close_matches(name.upper(), known, n=2, cutoff=0.85))
        if close:
            rows.append(VariableReport(name, value, "no effect", "no variable has this name", close))
    return tuple(rows)


def _choosing(name: str, value: str, decides: str) -> VariableReport:
    words = [word.strip() for word in value.split(",") if word.strip()]
    if not words or words == ["anyattn"]:
        return VariableReport(name, value, "no effect", "names no backend of anyattn")
    unknown = [word for word in words if registry.canonical(word) is None]
    if unknown:
        near = tuple(dict.fromkeys(close for word in unknown for close in registry.like(word)))
        beaten = "" if name == decides else f"; {decides} decides"
        state: State = "wrong" if name == decides else "overruled"
        return VariableReport(name, value, state, f"no backend is called {' or '.join(unknown)}{beaten}", near)
    if name != decides:
        return VariableReport(name, value, "overruled", f"{decides} decides")
    if len(words) == 1 and registry.canonical(words[0]) != AUTO:
        return VariableReport(name, value, "in force", "required: another backend is never taken instead")
    return VariableReport(name, value, "in force", "the first that admits a call runs it")


def _policy(value: str) -> VariableReport:
    if not value.strip():
        return VariableReport(ENV_POLICY, value, "no effect", "names no policy")
    try:
        policy = Policy.from_env(environ={ENV_POLICY: value})
    except (InvalidSettingError, UnknownBackendError) as error:
        close = difflib.get_close_matches(value.strip(), Policy.names(), n=1)
        return VariableReport(ENV_POLICY, value, "wrong", str(error), tuple(close))
    rules = "1 rule" if len(policy.rules) == 1 else f"{len(policy.rules)} rules"
    return VariableReport(ENV_POLICY, value, "in force", f"{rules}, where a program asks anyattn.Policy.from_env()")


def _local_kernels(value: str) -> VariableReport:
    """Report the variable of the package `kernels` that puts folders in the place of the Hub's repositories."""
    wrong = malformed(value)
    if wrong is not None:
        note = f"{wrong!r} isn't repo=folder; every hub backend is refused until it is fixed"
        return VariableReport(LOCAL_KERNELS, value, "wrong", note)
    note = "hub backends load these folders, with neither the revision nor the publisher checked"
    return VariableReport(LOCAL_KERNELS, value, "in force", note)


def _checking(name: str, value: str) -> VariableReport:
    wanted = defaults.means_yes(value)
    if wanted is None:
        close = difflib.get_close_matches(
            value.strip().lower(), ("1", "yes", "true", "on", "0", "no", "false", "off"), n=2
        )
        return VariableReport(name, value, "wrong", "neither a yes (1, yes, true, on) nor a no", tuple(close))
    note = "values are checked at every call" if wanted else "no value checks"
    return VariableReport(name, value, "in force", note)
