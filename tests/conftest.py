"""What every test starts from: one thread, fixed seeds, no preference set, nothing decided."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import anyattn
import law_counts
from anyattn.scopes import defaults

VARIABLES = (
    defaults.ENV_BACKEND,
    defaults.ENV_BACKEND_DIFFUSERS,
    defaults.ENV_CHECKS,
    defaults.ENV_CHECKS_DIFFUSERS,
    "LOCAL_KERNELS",
    "KERNELS_CACHE",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    torch.manual_seed(0)
    anyattn.set_default_backend(None)
    anyattn.reset()
    yield
    anyattn.set_default_backend(None)
    anyattn.reset()


def _law_counts(config: pytest.Config) -> list[law_counts.Row]:
    # The tests may have run in other processes (pytest-xdist): their reports come here, what they print doesn't.
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else law_counts.of_reports(reporter.stats)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = _law_counts(config)
    if rows:
        terminalreporter.section("laws executed")
        for line in law_counts.lines(rows):
            terminalreporter.line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and law_counts.without_any(_law_counts(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
