"""`anyattn doctor`: this machine, every known backend, what each does when it is tried, and what fixes it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from anyattn import __version__
from anyattn.cli.commands.doctor.catalogue import KnownBadReport, Listed, cure, known_bad_here, listed, machine
from anyattn.cli.commands.doctor.probe import Job, Probe, run_all
from anyattn.cli.commands.doctor.trial import Trial, main_device
from anyattn.cli.commands.doctor.variables import CHECKING, CHOOSING, VariableReport, variables
from anyattn.cli.reports import Progress, Step
from anyattn.environment import Environment, detect
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.selection.faults import broken_import
from anyattn.selection.resolve import order
from anyattn.types.names import AUTO
from anyattn.types.reasons import Reason

__all__ = ["STEP_TIMEOUT", "BackendReport", "DefaultReport", "DoctorReport", "doctor"]

STEP_TIMEOUT = 120.0
"""Seconds that one step of a trial may take; compiling a kernel for the first time is the slowest."""

BackendState = Literal["works", "fails", "not tried", "unusable"]
_BAD = frozenset(("wrong", "raised", "died", "hung"))


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One known backend on this machine.

    Attributes:
        name: Its name.
        family: The group that shares a kernel source.
        state: `"works"`: some step passed and none went wrong; `"fails"`: one did; `"not tried"`: usable as
            far as is known; `"unusable"`: see `reasons`.
        installed: Whether its kernel's package is there.
        package: That package.
        found: Its version here; empty if it isn't installed.
        wanted: What the backend needs.
        install: The command that installs that; empty if it comes with torch.
        exact: Whether it computes in the inputs' precision.
        reasons: Everything that keeps it from being usable.
        cure: What to do about them; empty if nothing helps.
        trials: What came of each step.
        ended: How its process ended, if it ended early.
        output: The last lines that the process wrote then.
        double: Whether a contract double stands for its kernel in this process, which says nothing of the kernel: it
            isn't tried.
        downloads: Whether its kernel may be downloaded, so that it is tried only if it is named.
        origin: Where its kernel's code comes from; empty if it is part of torch.
    """

    name: str
    family: str
    state: BackendState
    installed: bool
    package: str
    found: str
    wanted: str
    install: str
    exact: bool
    reasons: tuple[Reason, ...]
    cure: str
    trials: tuple[Trial, ...] = ()
    ended: str = ""
    output: tuple[str, ...] = ()
    double: bool = False
    downloads: bool = False
    origin: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "name": self.name,
            "family": self.family,
            "state": self.state,
            "installed": self.installed,
            "package": self.package,
            "found": self.found,
            "wanted": self.wanted,
            "install": self.install,
            "exact": self.exact,
            "reasons": [reason.to_dict() for reason in self.reasons],
            "cure": self.cure,
            "trials": [trial.to_dict() for trial in self.trials],
            "ended": self.ended,
            "output": list(self.output),
            "double": self.double,
            "downloads": self.downloads,
            "origin": self.origin,
        }


@dataclass(frozen=True, slots=True)
class DefaultReport:
    """What a call gets that names no backend.

    Attributes:
        names: The backends in force by default, in order of preference.
        source: What puts them in force: an environment variable, or `"built-in"`.
        device: The type of device that was looked at.
        works: Whether such a call runs and is right; if nothing was tried, whether a backend is usable.
        tried: Whether such a call was made.
        chosen: The backend that ran it.
        kernel: The entry of that backend's kernel.
        detail: What is wrong; empty if it works.
        compiled: What came of the same call inside torch.compile, as in a trial's outcome; empty if it wasn't tried.
        compiled_detail: Why it isn't `"passed"`.
    """

    names: tuple[str, ...]
    source: str
    device: str
    works: bool
    tried: bool
    chosen: str = ""
    kernel: str = ""
    detail: str = ""
    compiled: str = ""
    compiled_detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "names": list(self.names),
            "source": self.source,
            "device": self.device,
            "works": self.works,
            "tried": self.tried,
            "chosen": self.chosen,
            "kernel": self.kernel,
            "detail": self.detail,
            "compiled": self.compiled,
            "compiled_detail": self.compiled_detail,
        }


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `anyattn doctor` found.

    Attributes:
        environment: The machine.
        variables: The environment variables that are set.
        default: What a call gets that names no backend.
        backends: Every known backend.
        known_bad: The rows of the known-bad table that concern this machine.
    """

    environment: Environment
    variables: tuple[VariableReport, ...]
    default: DefaultReport
    backends: tuple[BackendReport, ...]
    known_bad: tuple[KnownBadReport, ...]

    @property
    def exit_code(self) -> int:
        """0 if the default works, else 1."""
        return 0 if self.default.works else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "ok": self.exit_code == 0,
            "anyattn": __version__,
            "environment": self.environment.to_dict(),
            "variables": [variable.to_dict() for variable in self.variables],
            "default": self.default.to_dict(),
            "backends": [backend.to_dict() for backend in self.backends],
            "known_bad": [row.to_dict() for row in self.known_bad],
        }


def doctor(
    only: Sequence[str] = (),
    *,
    try_kernels: bool = True,
    timeout: float = STEP_TIMEOUT,
    environ: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> DoctorReport:
    """Look at this machine and try every usable backend on tiny inputs, each in a process of its own.

    Args:
        only: The backends to try, by name or alias; empty is every one that is usable, but for those that would
            download their kernel.
        try_kernels: Whether to try them. Backends of other packages are imported in a process of their own
            even if not, because nothing else tells what they are.
        timeout: Seconds that one step may take.
        environ: The environment variables; None is this process's.
        progress: Called for each process that finished.

    Raises:
        UnknownBackendError: If no backend has such a name.
    """
    environ = os.environ if environ is None else environ
    wanted = {registry.resolve_name(name) for name in only}
    env = detect()
    rows = listed(env)
    found_variables = variables(environ)
    # A variable that no call can follow is the finding; it must not hide what the backends do.
    calm = {name: value for name, value in environ.items() if name not in (*CHOOSING, *CHECKING)}
    jobs = [] if not try_kernels else [Job("", environ=environ)]
    for row in rows:
        named = row.name in wanted
        # A double exists in this process only, and is no kernel.
        tried = try_kernels and not row.double and (named or (not wanted and not row.downloads))
        if row.reasons is None or (tried and not row.reasons):
            jobs.append(Job(row.name, tried, calm, named))

    def finished(job: Job, done: int) -> None:
        if progress is not None:
            progress(Step(f"tried {job.name or 'the default'}", done, len(jobs)))

    if progress is not None and jobs:
        progress(Step("trying every backend in a process of its own", 0, len(jobs)))
    probes = run_all(jobs, timeout=timeout, finished=finished)
    backends = tuple(_backend(row, probes.get(row.name), env) for row in rows)
    default = _default(found_variables, probes.get(""), backends, env, environ)
    return DoctorReport(machine(env), found_variables, default, backends, known_bad_here(env))


def _backend(row: Listed, probe: Probe | None, env: Environment) -> BackendReport:
    """Join what is known of a backend with how far its process came."""
    reasons, family, exact = row.reasons or (), row.family, row.exact
    if probe is not None:
        described = probe.described
        if probe.broke_import or (described is None and row.reasons is None):
            reasons = (broken_import(row.name, probe.ended, row.install),)
        elif described is not None:
            family, exact = described["family"] or family, described["exact"]
            reasons = tuple(Reason(**reason) for reason in described["reasons"])
    if row.reasons is None and _uninstall(row):
        reasons = tuple(
            replace(reason, hint=_uninstall(row)) if reason.code == "broken_import" else reason for reason in reasons
        )
    trials = () if probe is None else probe.trials
    state = _state(reasons, trials)
    return BackendReport(
        name=row.name,
        family=family,
        state=state,
        installed=bool(row.found),
        package=row.package,
        found=row.found,
        wanted=row.wanted,
        install=row.install,
        exact=exact,
        reasons=reasons,
        cure=_cure_of_failing(row) if state == "fails" else cure(reasons, row.install, env),
        trials=trials,
        ended="" if probe is None else probe.ended,
        output=() if probe is None else probe.output,
        double=row.double,
        downloads=row.downloads,
        origin=row.origin,
    )


def _cure_of_failing(row: Listed) -> str:
    fits = f", or get a build that fits this torch and device: {row.install}" if row.install else ""
    return f"choose another backend (auto and lists skip it if it raises){fits}"


def _uninstall(row: Listed) -> str:
    return f"fix or uninstall {row.package}: anyattn imports it at its first call" if row.package else ""


def _state(reasons: Sequence[Reason], trials: Sequence[Trial]) -> BackendState:
    if reasons:
        return "unusable"
    outcomes = {trial.outcome for trial in trials}
    if outcomes & _BAD:
        return "fails"
    return "works" if "passed" in outcomes else "not tried"


def _default(
    found: Sequence[VariableReport],
    probe: Probe | None,
    backends: Sequence[BackendReport],
    env: Environment,
    environ: Mapping[str, str],
) -> DefaultReport:
    wish = defaults.from_environment(environ)
    names = tuple(registry.canonical(name) or name for name in wish.names)
    report = DefaultReport(names, wish.source, main_device(env), False, probe is not None)
    ours = (*CHOOSING, *CHECKING)
    wrong = [variable for variable in found if variable.state == "wrong" and variable.name in ours]
    if wrong:
        first = wrong[0]
        return replace(report, detail=f"{first.name} is {first.value!r}: {first.note}")
    if probe is None:
        return _untried(report, backends, env)
    if not probe.trials:
        return replace(report, detail=f"the process that tried it {probe.ended}")
    trial, *rest = probe.trials
    report = replace(report, chosen=trial.backend, kernel=trial.kernel, detail=trial.detail)
    if rest:
        report = replace(report, compiled=rest[0].outcome, compiled_detail=rest[0].detail)
    if trial.outcome == "passed":
        return replace(report, works=True)
    broken = [row.name for row in backends if any(reason.code == "broken_import" for reason in row.reasons)]
    if broken:
        note = f"{' and '.join(broken)} can't be imported, which may be the cause: see below"
        return replace(report, detail=f"{trial.detail}; {note}")
    return report


def _untried(report: DefaultReport, backends: Sequence[BackendReport], env: Environment) -> DefaultReport:
    """Say what can be said without running anything."""
    usable = {row.name for row in backends if not row.reasons and not row.double}
    at_hand = [found for name, found in registry.known(registry.built_in_names()) if name in usable]
    wanted: list[str] = []
    for name in report.names:
        wanted += order(report.device, at_hand)[0] if name == AUTO else (name,)
    chosen = next((name for name in wanted if name in usable), "")
    if chosen:
        return replace(report, works=True, chosen=chosen)
    reasons = next((row.reasons for row in backends if row.name in wanted), ())
    return replace(report, detail="; ".join(map(str, reasons)) or "no requested backend is usable")
