"""Run the laws for backends on this machine, and report what was run, refused and broken."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from anyattn.backend.capabilities import Capabilities
from anyattn.environment import detect
from anyattn.selection import registry
from anyattn.testing.cases.case import Case
from anyattn.testing.cases.drawing import always, drawn, space
from anyattn.testing.laws import LAWS, Law, LawBroken
from anyattn.types.reasons import Reason

Progress = Callable[[str, str, int, int], None]
"""`progress(backend, law, done, of)`: called before each law and after the last."""


@dataclass(frozen=True)
class Failure:
    """One law broken by one case.

    Attributes:
        what: What was wrong.
        reproduction: One line of Python that breaks it again.
        worst: The error in multiples of what is allowed, or 0.
    """

    what: str
    reproduction: str
    worst: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        worst = self.worst if self.worst < float("inf") else "inf"
        return {"what": self.what, "reproduction": self.reproduction, "worst": worst}


@dataclass(frozen=True)
class LawReport:
    """The results of one law for one backend.

    Attributes:
        law: Its name.
        number: Its number.
        statement: The law in a few words.
        run: The number of cases executed.
        passed: The number of those that passed.
        refused: The number of cases that the backend refused, or that the law doesn't apply to.
        worst: The largest error among those that passed, in multiples of what is allowed.
        reasons: The number of refusals for each reason, by its code.
        failures: What broke it.
    """

    law: str
    number: int
    statement: str
    run: int
    passed: int
    refused: int
    worst: float
    reasons: tuple[tuple[str, int], ...]
    failures: tuple[Failure, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "law": self.law,
            "number": self.number,
            "statement": self.statement,
            "run": self.run,
            "passed": self.passed,
            "refused": self.refused,
            "worst": self.worst,
            "reasons": dict(self.reasons),
            "failures": [failure.to_dict() for failure in self.failures],
        }


@dataclass(frozen=True)
class BackendReport:
    """The results of all laws for one backend.

    Attributes:
        backend: Its name.
        laws: One report for each law.
        unusable: Why it can't be used here.
        ran: What was run: `"kernel"`, or `"contract double"`, which proves only the adapter.
    """

    backend: str
    laws: tuple[LawReport, ...] = ()
    unusable: tuple[Reason, ...] = ()
    ran: str = "kernel"

    @property
    def run(self) -> int:
        """How many cases were executed."""
        return sum(law.run for law in self.laws)

    @property
    def status(self) -> str:
        """`"passed"`, `"failed"`, or `"not verified"` if no law was executed."""
        if any(law.failures for law in self.laws):
            return "failed"
        # The law about refusals executes no kernel.
        executed = sum(law.run for law in self.laws if law.law != "rejected")
        return "passed" if executed else "not verified"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "backend": self.backend,
            "status": self.status,
            "ran": self.ran,
            "run": self.run,
            "unusable": [reason.to_dict() for reason in self.unusable],
            "laws": [law.to_dict() for law in self.laws],
        }


@dataclass(frozen=True)
class VerifyReport:
    """The results of the laws on this machine.

    Attributes:
        device: The type of device that was tested.
        machine: What it is.
        torch: The version of torch.
        seed: The random seed of the drawn cases.
        backends: One report for each backend.
    """

    device: str
    machine: str
    torch: str
    seed: int
    backends: tuple[BackendReport, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether something was verified, and no law broken."""
        states = {backend.status for backend in self.backends}
        return "passed" in states and "failed" not in states

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "device": self.device,
            "machine": self.machine,
            "torch": self.torch,
            "seed": self.seed,
            "passed": self.passed,
            "backends": [backend.to_dict() for backend in self.backends],
        }

    def __str__(self) -> str:
        lines = [f"{self.machine}, torch {self.torch}, seed {self.seed}"]
        for backend in self.backends:
            # A double's result must never read as a kernel's.
            of = "" if backend.ran == "kernel" else f" ({backend.ran})"
            lines.append(f"{backend.backend}{of}: {backend.status}, {backend.run} executed")
            lines += [f"  {reason}" for reason in backend.unusable]
            for law in backend.laws:
                counts = f"{law.passed} of {law.run} passed, {law.refused} refused"
                lines.append(f"  {law.number:2d} {law.law}: {counts}, worst {law.worst:.2f} of what is allowed")
                for failure in law.failures:
                    lines.append(f"     {failure.what}\n       {failure.reproduction}")
        return "\n".join(lines)


def verify(
    backend: str | Sequence[str] | None = None,
    *,
    device: str | None = None,
    cases: int | Sequence[Case] = 60,
    laws: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run the laws for one backend, several, or all, on this machine.

    Args:
        backend: A name or alias, or several; None is every backend. One that would download its kernel is run only if
            it is named.
        device: `"cpu"`, `"cuda"`, ...; None is `"cuda"` if there is a CUDA device, else `"cpu"`.
        cases: The number of cases to draw from each declaration, besides the adversarial ones; or the cases themselves.
        laws: The names of the laws to run; None is all.
        seed: The random seed of the drawn cases: the same seed draws the same cases.
        progress: Called before each law.

    Returns:
        The report. A backend for which nothing was executed is "not verified", never passed.

    Raises:
        UnknownBackendError: If a name is unknown.

    Example:
        >>> report = verify("native_math", device="cpu", cases=0, laws=["unchanged"])
        >>> report.passed
        True
    """
    env = detect()
    if device is None:
        device = "cuda" if env.device("cuda") is not None else "cpu"
    found = env.device(device)
    if backend is None:
        names: list[str] = list(registry.names())
    else:
        names = [registry.resolve_name(name) for name in ([backend] if isinstance(backend, str) else backend)]
    chosen = [LAWS[name] for name in laws] if laws is not None else list(LAWS.values())
    total = len(names) * len(chosen)
    reports = []
    for place, name in enumerate(names):
        done = (place * len(chosen), total)
        reports.append(_backend(name, device, cases, chosen, seed, progress, done, named=backend is not None))
    if progress is not None:
        progress("", "", total, total)
    machine = f"{found.name if found is not None else 'none'} ({platform.system()} {platform.machine()})"
    return VerifyReport(device, machine, torch.__version__, seed, tuple(reports))


def _backend(
    name: str,
    device: str,
    cases: int | Sequence[Case],
    laws: Sequence[Law],
    seed: int,
    progress: Progress | None,
    done: tuple[int, int],
    *,
    named: bool,
) -> BackendReport:
    backend = registry.get(name)
    caps = backend.declarations.get(device)
    reasons = tuple(backend.availability(detect()))
    if caps is None:
        served = " or ".join(backend.declarations)
        reasons = (*reasons, Reason("device_type", f"tensors on {served}", device))
    if backend.downloads and not named:
        need = "to be named, since its code is downloaded"
        reasons = (*reasons, Reason("not_named", need, "every backend asked for", f"verify({name!r})"))
    if caps is None or reasons:
        return BackendReport(name, unusable=reasons)
    reports = []
    for place, law in enumerate(laws):
        if progress is not None:
            progress(name, law.name, done[0] + place, done[1])
        reports.append(_law(law, name, caps, cases_for(law, caps, device, cases, seed)))
    return BackendReport(name, tuple(reports), ran="contract double" if backend.is_double else "kernel")


def cases_for(
    law: Law, caps: Capabilities, device: str, cases: int | Sequence[Case] = 60, seed: int = 0
) -> Iterator[Case]:
    """Return the cases that a law is run with, changed to ones it applies to: adversarial ones, then drawn ones."""
    if isinstance(cases, int):
        drawn_ones = drawn(cases, seed, space(None if law.wide else caps, device))
        found = [*always(caps, device), *drawn_ones]
    else:
        found = list(cases)
    return (law.apt(case, caps) for case in found[:: law.share])


def _law(law: Law, backend: str, caps: Capabilities, cases: Iterator[Case]) -> LawReport:
    run = passed = refused = 0
    worst = 0.0
    reasons: dict[str, int] = {}
    failures: list[Failure] = []
    for case in cases:
        try:
            result = law.check(backend, case)
        except LawBroken as broken:
            run += 1
            failures.append(Failure(broken.what, broken.reproduction, broken.worst))
        except Exception as error:  # noqa: BLE001 - a kernel raises whatever it likes, in its backward too
            # A kernel that raises for a call that it admits breaks the law under test.
            run += 1
            raised = LawBroken(law.name, backend, case, f"raises {type(error).__name__}: {error}")
            failures.append(Failure(raised.what, raised.reproduction, 0.0))
        else:
            if result.status == "passed":
                run, passed = run + 1, passed + 1
                worst = max(worst, result.worst)
            else:
                refused += 1
                for reason in result.reasons:
                    reasons[reason.code] = reasons.get(reason.code, 0) + 1
    counted = tuple(sorted(reasons.items()))
    return LawReport(law.name, law.number, law.statement, run, passed, refused, worst, counted, tuple(failures))
