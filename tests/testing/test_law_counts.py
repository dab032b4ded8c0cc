"""The summary of a test run says what ran for each backend, and a backend without an executed law fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import law_counts

TEST = """
import law_counts
import pytest


@pytest.mark.parametrize(("name", "ran", "run"), [("one", "kernel", 3), ("two", "contract double", {run})])
def test_laws(name, ran, run, record_property):
    row = {{"backend": name, "ran": ran, "executed": {{"right": run, "halves": 0}}, "refused": 7}}
    record_property(law_counts.PROPERTY, row)
"""


HOOKS = ("pytest_sessionfinish", "pytest_terminal_summary")
CONFTEST = f"from law_counts import {', '.join(HOOKS)}\n"
"""The hooks without what else the tests' own conftest.py does: it imports torch, in every process."""


def test_hooks_are_those_of_this_session(pytestconfig: pytest.Config) -> None:
    path = str(Path(law_counts.__file__).parent / "conftest.py")
    conftest = pytestconfig.pluginmanager.get_plugin(path)
    for name in HOOKS:
        called = [found for found in getattr(pytestconfig.hook, name).get_hookimpls() if found.plugin is conftest]
        assert [found.function for found in called] == [getattr(law_counts, name)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("run", [5, 0])
def test_counts_are_told_and_none_fails_the_run(tmp_path: Path, run: int, workers: int) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "law_counts.py").write_text(Path(law_counts.__file__).read_text())
    (tmp_path / "test_them.py").write_text(TEST.format(run=run))
    # Importing hypothesis takes a second in each process, and it has no part in this.
    without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    command = [sys.executable, "-m", "pytest", "-q", *without, "-n", str(workers), "test_them.py"]
    if workers:
        pytest.importorskip("xdist", reason="the development tools bring pytest-xdist")
    else:
        command = [part for part in command if part not in ("-n", "0")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "one (kernel): 3 executed, 7 refused; right 3, halves 0" in done.stdout, done.stdout + done.stderr
    said = "5" if run else "NO LAW"
    assert f"two (contract double): {said} executed, 7 refused" in done.stdout
    assert done.returncode == (0 if run else 1)
