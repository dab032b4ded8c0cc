"""How many laws a test run executed for each backend: told at its end, and none at all fails it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

PROPERTY = "laws"

Row = Mapping[str, Any]


def counts(report: Any) -> dict[str, Any]:
    """Give what the summary tells of a backend's report, as plain data that goes from process to process."""
    return {
        "backend": report.backend,
        "ran": report.ran,
        # The law about refusals executes no kernel.
        "executed": {law.law: law.run for law in report.laws if law.law != "rejected"},
        "refused": sum(law.refused for law in report.laws),
    }


def of_reports(stats: Mapping[str, Iterable[Any]]) -> list[Row]:
    """Collect the counts that tests recorded, from a terminal reporter's reports."""
    found = []
    for reports in stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                found += [value for name, value in report.user_properties if name == PROPERTY]
    return found


def lines(rows: Iterable[Row]) -> list[str]:
    """Write a line for each backend: what ran, how many laws were executed, and how many cases were refused."""
    made = []
    for row in rows:
        each = ", ".join(f"{law} {count}" for law, count in row["executed"].items())
        total = sum(row["executed"].values())
        what = f"{row['backend']} ({row['ran']})"
        made.append(f"{what}: {total or 'NO LAW'} executed, {row['refused']} refused; {each}")
    return made


def without_any(rows: Iterable[Row]) -> list[str]:
    """Name the backends for which no law was executed."""
    return [row["backend"] for row in rows if not sum(row["executed"].values())]


def _of_session(config: pytest.Config) -> list[Row]:
    # The tests may have run in other processes (pytest-xdist): their reports come here, what they print doesn't.
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else of_reports(reporter.stats)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = _of_session(config)
    if rows:
        terminalreporter.section("laws executed")
        for line in lines(rows):
            terminalreporter.line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and without_any(_of_session(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
