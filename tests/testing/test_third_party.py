"""A package with an entry point adds a backend, and the shipped suite runs on it, in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anyattn.environment import detect, preset

MODULE = """
from anyattn.adapters.native import NativeMath
from anyattn.sources.packages import Package


class Mine(NativeMath):
    name = "mine"


class Packaged(NativeMath):
    name = "packaged"
    needed = Package("typing_extensions", "typing_extensions", (), ">=4", found_by="typing_extensions")

    def availability(self, env):
        yield from self.needed.reasons(env)


class Missing(Packaged):
    name = "missing"
    needed = Package("no-such-kernel", "no_such_kernel", (), install="pip install no-such-kernel")


class Old(Packaged):
    name = "old"
    needed = Package("Typing.Extensions", "typing_extensions", (), "<1")


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
        "packaged = their_attention:Packaged\nmissing = their_attention:Missing\nold = their_attention:Old\n"
    )
    return site


def _python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
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


def test_package_that_only_a_third_party_names_is_looked_for(package: Path) -> None:
    code = (
        "import torch, anyattn; q = torch.randn(1, 5, 2, 8);"
        "rows = {row.name: [reason.code for reason in row.reasons] for row in anyattn.backends()};"
        "print(rows['packaged'], rows['missing'], rows['old']);"
        "chosen = anyattn.explain(q, q, q, backend='packaged').chosen;"
        "print(chosen, anyattn.attention(q, q, q, backend='packaged').shape)"
    )
    done = _python(package, "-c", code)
    assert done.stdout.split("\n")[:2] == [
        "[] ['not_installed'] ['wrong_version']",
        "packaged torch.Size([1, 5, 2, 8])",
    ], done.stderr


def test_made_up_machine_holds_what_it_was_given_alone() -> None:
    made_up = preset("h100", packages={"typing-extensions": "4.1"})
    assert made_up.packages["Typing_Extensions"] == "4.1"
    assert "pytest" not in made_up.packages
    assert detect().packages["pytest"] == pytest.__version__
    assert "pytest" in detect().modules
    assert "pytest" not in dataclasses.replace(detect(), packages={}, modules=frozenset()).packages
    before = hash(detect())
    assert "no-such-thing" not in detect().packages
    assert hash(detect()) == before
    assert "pytest" not in dict(detect().packages), "what is looked up changes neither the value nor its hash"


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
