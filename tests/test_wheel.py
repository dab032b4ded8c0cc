"""The wheel, built and installed where nothing is but what it declares: it holds the package, and works."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anyattn"


def run(*command: str | Path, path: str = "", cwd: Path = ROOT) -> str:
    """Run a command without the PYTHONPATH and the user packages of this process; raises with its output."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"PYTHONNOUSERSITE": "1", "COLUMNS": "80", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environ |= {"PYTHONPATH": path} if path else {}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environ, cwd=cwd, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as a release does; hatchling comes with the extra `dev`."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT, path=os.environ.get("PYTHONPATH", ""))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, beside what its metadata asks for with the extra `cli`."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (declared,) = importlib.metadata.distributions(name="anyattn", path=[str(site)])
    asked = [Requirement(line) for line in declared.requires or ()]
    for name, place in top_level([one for one in asked if wanted(one, "cli")]).items():
        (site / name).symlink_to(place, target_is_directory=place.is_dir())
    return python


def wanted(requirement: Requirement, *extras: str) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def top_level(requirements: list[Requirement]) -> Mapping[str, Path]:
    """Return the files and folders of distributions and of what they need in turn, by name in site-packages."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    while requirements:
        requirement = requirements.pop()
        name = requirement.name.lower()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            first = file.parts[0]
            if first not in ("..", "__pycache__"):
                found[first] = Path(str(distribution.locate_file(first)))
        needs = map(Requirement, distribution.requires or ())
        requirements += [need for need in needs if wanted(need, *requirement.extras)]
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name for name in names if name.endswith("/METADATA")).partition("/")[0]
    sources = {f"anyattn/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")} | {"anyattn/py.typed"}
    sources |= {f"anyattn/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.json")}
    assert {name for name in names if not name.startswith(f"{info}/")} == sources
    assert {f"{info}/entry_points.txt", f"{info}/licenses/LICENSE"} <= set(names)
    assert not [name for name in names if "double" in name or name.startswith("tests")]


def test_installed_wheel_imports_and_computes_attention(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
import torch, anyattn
q, k, v = torch.randn(3, 1, 6, 2, 8)
out = anyattn.attention(q, k, v, is_causal=True)
right = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
torch.testing.assert_close(out, right.transpose(1, 2))
print(anyattn.__file__, anyattn.__version__, anyattn.explain(q, k, v).chosen)
"""
    file, version, chosen = run(installed, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chosen == "native"


def test_installed_command_explains_a_call(installed: Path, tmp_path: Path) -> None:
    command = installed.with_name("anyattn.exe" if os.name == "nt" else "anyattn")
    said = run(command, "explain", "--shape", "2,128,4,64", "--device", "cpu", cwd=tmp_path)
    assert said.startswith("native runs this call")
    assert "pip install" in run(command, "doctor", "--no-try", cwd=tmp_path)
