"""A package with an entry point adds a backend, and the shipped suite runs on it, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
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
    packages = (Package("typing_extensions", "typing_extensions", (), ">=4", found_by="typing_extensions"),)


class Missing(Packaged):
    name = "missing"
    packages = (Package("no-such-kernel", "no_such_kernel", (), install="pip install no-such-kernel"),)


class Old(Packaged):
    name = "old"
    packages = (Package("Typing.Extensions", "typing_extensions", (), "<1"),)


class Theirs(NativeMath):
    name = "theirs"
    family = "theirs"
    aliases = ("their_flash",)
    auto_rank = 3
    packages = (Package("their-kernel", "their_kernel", ("weigh",), ">=2"),)
    declarations = {"cpu": NativeMath.declarations["cpu"]}


class Wrong(NativeMath):
    name = "wrong"

    @staticmethod
    def run(plan, query, key, value, parts):
        return NativeMath.run(plan, query, key, value, parts) * 1.01
"""

TEST = """
import pytest

import anyattn
from anyattn import testing
from anyattn.adapters.native import NativeMath
from anyattn.testing import LAWS

# Enough that every law is executed. `test_conformance` runs all of them, and more, on the same computation.
SOME = testing.always(NativeMath.declarations["cpu"])[::3]


def executed(report):
    return {law.law for law in report.backends[0].laws if law.run}


def test_mine():
    assert executed(testing.run("mine", cases=SOME)) == set(LAWS)


def test_wrong():
    with pytest.raises(AssertionError, match="check..right., .wrong., Case"):
        testing.run("wrong", cases=0, laws=["right"])


def test_alias():
    report = anyattn.verify("their_flash", cases=SOME)
    assert report.passed, report.to_dict()
    assert report.backends[0].backend == "theirs"
    assert executed(report) == set(LAWS)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return _package(tmp_path)


NAMES = {
    "mine": "Mine",
    "wrong": "Wrong",
    "theirs": "Theirs",
    "packaged": "Packaged",
    "missing": "Missing",
    "old": "Old",
}


def _package(folder: Path, *names: str) -> Path:
    """Lay a package out as an installer does: a module, and a dist-info with entry points."""
    site = folder / "site"
    info = site / "their_attention-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "their_attention.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-attention\nVersion: 1.0\n")
    lines = "".join(f"{name} = their_attention:{NAMES[name]}\n" for name in names or NAMES)
    (info / "entry_points.txt").write_text(f"[anyattn.backends]\n{lines}")
    return site


def _python(site: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **settings}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=site, capture_output=True, text=True, check=False
    )


LISTED = """
import json, torch, anyattn

q = torch.randn(1, 5, 2, 8)
rows = {row.name: (row.usable, [reason.code for reason in row.reasons]) for row in anyattn.backends()}
ran = {
    name: (anyattn.explain(q, q, q, backend=name).chosen, anyattn.attention(q, q, q, backend=name).shape)
    for name in ("mine", "packaged")
}
print(json.dumps([rows, ran]))
"""


def test_installed_backends_and_the_packages_that_only_they_name_are_listed_and_called(package: Path) -> None:
    done = _python(package, "-c", LISTED)
    assert done.returncode == 0, done.stderr
    rows, ran = json.loads(done.stdout)
    assert rows["mine"] == rows["packaged"] == [True, []]
    assert rows["missing"] == [False, ["not_installed"]]
    assert rows["old"] == [False, ["wrong_version"]]
    assert ran == {"mine": ["mine", [1, 5, 2, 8]], "packaged": ["packaged", [1, 5, 2, 8]]}


def _with_kernel(site: Path, version: str) -> None:
    """Install their kernel, with its functions, beside the package that adapts it."""
    info = site / f"their_kernel-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-kernel\nVersion: {version}\n")
    (site / "their_kernel.py").write_text("def weigh(): ...\n")


THEIRS = """
import json, torch, anyattn

q = torch.randn(1, 5, 2, 8)
row = {row.name: row for row in anyattn.backends()}["theirs"]
chosen = [anyattn.explain(q, q, q, backend=wish).chosen for wish in ("theirs", "their_flash", "Their-Flash", "auto")]
with anyattn.record() as calls:
    anyattn.attention(q, q, q, backend="their_flash")
from anyattn.sources.packages import FUNCTIONS
print(json.dumps([chosen, calls[0].chosen, row.version, row.needs, row.usable, hasattr(FUNCTIONS["theirs"], "weigh")]))
"""


def test_their_kernel_is_found_by_name_alias_and_auto_and_loaded(package: Path) -> None:
    _with_kernel(package, "2.5")
    done = _python(package, "-c", THEIRS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["theirs"] * 4, "theirs", "2.5", "their-kernel >=2", True, True]


@pytest.mark.parametrize(("version", "got"), [("", "no distribution their-kernel"), ("1.9", "got 1.9")])
def test_their_kernels_floor_and_command_are_in_the_error(package: Path, version: str, got: str) -> None:
    if version:
        _with_kernel(package, version)
    code = (
        "import torch, anyattn; q = torch.randn(1, 5, 2, 8);"
        "print(anyattn.explain(q, q, q, backend='auto').chosen)\n"
        "try: anyattn.attention(q, q, q, backend='their_flash')\n"
        "except anyattn.BackendUnavailableError as error: print(error)"
    )
    done = _python(package, "-c", code)
    assert done.stdout.startswith("native\n"), done.stderr
    assert "their-kernel >=2" in done.stdout
    assert "pip install 'their-kernel>=2'" in done.stdout
    assert got in done.stdout


def test_doctor_tries_their_kernel(tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command line is an extra of anyattn")
    # The doctor starts a process for each backend of a package.
    package = _package(tmp_path, "theirs")
    _with_kernel(package, "2.5")
    done = _python(package, "-c", "from anyattn.cli import main; main()", "doctor", "theirs", "--json")
    (row,) = (row for row in json.loads(done.stdout)["backends"] if row["name"] == "theirs")
    assert (row["state"], row["package"]) == ("works", "their-attention"), done.stderr


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


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Run the package's own tests and the shipped ones in one session: importing torch takes as long as a test."""
    site = _package(tmp_path_factory.mktemp("suite"))
    _with_kernel(site, "2.5")
    (site / "test_theirs.py").write_text(TEST)
    settings = {"ANYATTN_TEST_BACKENDS": "mine", "ANYATTN_TEST_CASES": "10"}
    arguments = ("-q", "-rA", "-p", "no:cacheprovider", "test_theirs.py", "--pyargs", "anyattn.testing")
    return _python(site, "-m", "pytest", *arguments, **settings)


@pytest.mark.parametrize("test", ["test_mine", "test_wrong"])
def test_suite_runs_on_third_party(session: subprocess.CompletedProcess[str], test: str) -> None:
    assert f"PASSED test_theirs.py::{test}\n" in session.stdout, session.stdout + session.stderr


def test_laws_run_on_their_kernel_by_its_alias(session: subprocess.CompletedProcess[str]) -> None:
    assert "PASSED test_theirs.py::test_alias\n" in session.stdout, session.stdout + session.stderr


def test_pyargs_runs_the_laws(session: subprocess.CompletedProcess[str]) -> None:
    assert re.search(r"^PASSED .*test_conformance.py::test_laws\[mine\]$", session.stdout, re.MULTILINE), session.stdout
    assert session.returncode == 0, session.stdout + session.stderr
    assert "4 passed" in session.stdout
