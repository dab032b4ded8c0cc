"""`anyattn verify`: the laws of a backend, run on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyattn.cli.reports import Progress, Step, UsageError
from anyattn.cli.words import checked_device

if TYPE_CHECKING:
    from anyattn.testing.verify import BackendReport, VerifyReport

__all__ = ["CASES", "Verification", "verify"]

CASES = 60
"""How many cases are drawn from each declaration, besides the adversarial ones, by default."""


@dataclass(frozen=True)
class Verification:
    """The result of the laws.

    Attributes:
        report: Each law for each backend.
        named: Whether the backends were named; else those that can't run here are no failure.
    """

    report: VerifyReport
    named: bool

    @property
    def exit_code(self) -> int:
        """0 if some backend was verified, every one passed, and none that could run executed nothing; else 1."""
        judged = [row for row in self.report.backends if self.named or not row.unusable]
        return 0 if judged and all(row.status == "passed" for row in judged) else 1

    def skipped(self) -> tuple[BackendReport, ...]:
        """Return the backends for which nothing was executed."""
        return tuple(row for row in self.report.backends if row.status == "not verified")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {"ok": self.exit_code == 0, **self.report.to_dict()}


def verify(
    backends: Sequence[str] = (),
    *,
    device: str | None = None,
    cases: int = CASES,
    laws: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Run the laws for some backends, or for every one that is built.

    Args:
        backends: Names or aliases; empty is every backend with an adapter.
        device: `"cpu"`, `"cuda"`, ...; None is `"cuda"` if there is one, else `"cpu"`.
        cases: How many cases to draw from each declaration, besides the adversarial ones.
        laws: The names of the laws to run; empty is all.
        seed: Random seed of the drawn cases.
        progress: Called for each law.

    Raises:
        UsageError: If there is no such device or law here, or a package of `anyattn[testing]` is missing.
        UnknownBackendError: If a backend has no such name.
    """
    try:
        suite = importlib.import_module("anyattn.testing.verify")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("anyattn"):
            raise
        raise UsageError(f"The laws need {error.name}, which isn't installed: pip install 'anyattn[testing]'") from None
    place = checked_device(device)
    if ":" in place:
        raise UsageError(f"--device {place}: the laws run on the first device of a type; write {place.split(':')[0]}.")
    unknown = [law for law in laws if law not in suite.LAWS]
    if unknown:
        raise UsageError(f"--law {unknown[0]}: no such law. There are: {', '.join(suite.LAWS)}.")

    def report_progress(backend: str, law: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Step(f"{backend}: {law}" if backend else "done", done, total))

    names, chosen = tuple(backends) or None, tuple(laws) or None
    report = suite.verify(names, device=place, cases=cases, laws=chosen, seed=seed, progress=report_progress)
    return Verification(report, bool(backends))
