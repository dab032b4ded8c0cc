"""The laws on every adapter against its contract double: what can be shown of a kernel that isn't here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from anyattn.selection import registry
from anyattn.testing.cases.case import Case
from anyattn.testing.doubles import DOUBLES, installed
from anyattn.testing.verify import BackendReport, Progress, VerifyReport, verify
from anyattn.types.reasons import Reason


def verify_doubles(
    backend: str | Sequence[str] | None = None,
    *,
    cases: int | Sequence[Case] = 60,
    laws: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run the laws on adapters against their contract doubles, on the CPU. This proves adapters, never kernels.

    Args:
        backend: A name or alias, or several; None is every backend that has a double.
        cases: As for `anyattn.verify`.
        laws: As for `anyattn.verify`.
        seed: As for `anyattn.verify`.
        progress: As for `anyattn.verify`.

    Returns:
        The report; each backend's `ran` is `"contract double"`.

    Raises:
        UnknownBackendError: If a name is unknown.

    Example:
        >>> from anyattn.testing.doubles.suite import verify_doubles
        >>> report = verify_doubles("flash2", cases=0, laws=["unchanged"])
        >>> [(row.backend, row.ran, row.status) for row in report.backends]
        [('flash2', 'contract double', 'passed')]
    """
    if backend is None:
        names = list(DOUBLES)
    else:
        names = [registry.resolve_name(name) for name in ([backend] if isinstance(backend, str) else backend)]
    rows: list[BackendReport] = []
    report = None
    for name in names:
        if name not in DOUBLES:
            absent = Reason(
                "not_built", f"a contract double of {name}", "none", "anyattn.verify runs the kernel itself"
            )
            rows.append(BackendReport(name, unusable=(absent,), ran="contract double"))
            continue
        with installed(name):
            report = verify(name, device="cpu", cases=cases, laws=laws, seed=seed, progress=progress)
        rows += report.backends
    if report is None:
        report = verify((), device="cpu", seed=seed)
    return dataclasses.replace(report, backends=tuple(rows))
