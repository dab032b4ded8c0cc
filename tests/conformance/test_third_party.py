"""A package with an entry point adds a backend, and the shipped suite runs on it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from anyattn.adapters.native import NativeMath


class Mine(NativeMath):
    name = "mine"


class Wrong(NativeMath):
    name = "wrong"

    @staticmethod
    def run(plan, query, key, value, parts):
        return NativeMath.run(plan, query, key, value, parts) * 1.01
"""

TEST = """
import pytest

from anyattn import testing


def test_mine():
    testing.run("mine", cases=10)


def test_wrong():
    with pytest.raises(AssertionError, match="check..right., .wrong., Case"):
        testing.run("wrong", cases=0, laws=["right"])
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Lay a package out as an installer does: a module, and a dist-info with entry points."""
    site = tmp_path / "site"
    info = site / "their_attention-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "their_attention.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-attention\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[anyattn.backends]\nmine = their_attention:Mine\nwrong = their_attention:Wrong\n"
    )
    return site


def _python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=site, capture_output=True, text=True, check=False
    )


def test_installed_backend_is_listed_and_called(package: Path) -> None:
    code = (
        "import torch, anyattn; q = torch.randn(1, 5, 2, 8);"
        "print({row.name: row.usable for row in anyattn.backends()}['mine']);"
        "print(anyattn.explain(q, q, q, backend='mine').chosen, anyattn.attention(q, q, q, backend='mine').shape)"
    )
    done = _python(package, "-c", code)
    assert done.stdout.split("\n")[:2] == ["True", "mine torch.Size([1, 5, 2, 8])"], done.stderr


def test_suite_runs_on_third_party(package: Path) -> None:
    (package / "test_theirs.py").write_text(TEST)
    done = _python(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_pyargs_runs_the_laws(package: Path) -> None:
    os.environ["ANYATTN_TEST_BACKENDS"] = "mine"
    os.environ["ANYATTN_TEST_CASES"] = "5"
    try:
        done = _python(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "anyattn.testing")
    finally:
        del os.environ["ANYATTN_TEST_BACKENDS"], os.environ["ANYATTN_TEST_CASES"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
