"""The backend of the contributing guide is added to a copy of anyattn by one file and one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyattn

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
LINE = '    "plain": "anyattn.adapters.plain:Plain",\n'


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the package, and add the guide's file and one line to the copy."""
    root = tmp_path_factory.mktemp("source")
    package = root / "anyattn"
    shutil.copytree(Path(anyattn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    block = re.search(r"```python\n(import torch\n.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (package / "adapters" / "plain.py").write_text(block[1])
    registry = package / "selection" / "registry.py"
    before, last, after = registry.read_text().partition('    "npu": ')
    assert last
    registry.write_text(before + LINE + last + after)
    return root


def _python(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("ANYATTN")}
    settings |= {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=settings, cwd=source, capture_output=True, text=True, check=False
    )


CALLS = """
import json, torch, anyattn
from anyattn.selection import registry, resolve

q = torch.randn(1, 5, 2, 8)
row = {row.name: row for row in anyattn.backends()}["plain"]
order = resolve.order("cpu", [found for _, found in registry.known(registry.BUILTIN)], None)[0]
close = ""
try:
    anyattn.attention(q, q, q, backend="writen_out")
except anyattn.UnknownBackendError as error:
    close = str(error)
chosen = {}
for wish in ("plain", "written_out", "Written-Out", ["flash2", "plain"], ["flash2", "written_out", "native"]):
    with anyattn.record() as calls:
        out = anyattn.attention(q, q, q, backend=wish)
    assert torch.allclose(out, anyattn.attention(q, q, q, backend="native_math"), atol=1e-6)
    chosen[str(wish)] = calls[0].chosen
print(json.dumps([chosen, [row.usable, row.family, row.needs, row.install], order, close]))
"""


def test_backend_of_the_guide_is_found_by_name_alias_list_and_rank(source: Path) -> None:
    done = _python(source, "-c", CALLS)
    assert done.returncode == 0, done.stderr
    chosen, row, order, close = json.loads(done.stdout)
    assert set(chosen.values()) == {"plain"}
    assert row == [True, "plain", "torch >=2.8", ""]
    assert order.index("flex") < order.index("plain") < order.index("native_math")
    assert "'written_out'" in close


AUTO = """
import torch, anyattn
from anyattn.adapters.plain import Plain

q = torch.randn(1, 5, 2, 8)
for rank in (85, 9):
    Plain.auto_rank = rank
    anyattn.reset()
    print(anyattn.explain(q, q, q, backend="auto").chosen)
"""


def test_auto_takes_it_where_its_rank_says(source: Path) -> None:
    done = _python(source, "-c", AUTO)
    assert done.stdout.split() == ["native", "plain"], done.stderr


def test_doctor_lists_it(source: Path) -> None:
    pytest.importorskip("typer", reason="the command line is an extra of anyattn")
    done = _python(source, "-c", "from anyattn.cli import main; main()", "doctor", "--no-try", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["backends"]}
    assert rows["plain"]["wanted"] == "torch >=2.8", done.stderr
    assert rows["plain"]["reasons"] == []


def test_it_passes_the_laws(source: Path) -> None:
    code = "import anyattn; report = anyattn.verify('plain', cases=8); print(report.passed, report.to_dict())"
    done = _python(source, "-c", code)
    assert done.stdout.startswith("True"), done.stdout + done.stderr


def test_importing_anyattn_or_naming_it_imports_no_other_adapter(source: Path) -> None:
    code = (
        "import sys, anyattn; from anyattn.selection import registry;"
        "print([name for name in sys.modules if name.startswith('anyattn.adapters')]);"
        "registry.get(registry.resolve_name('plain'));"
        "print([name for name in sys.modules if name.startswith('anyattn.adapters.')])"
    )
    done = _python(source, "-c", code)
    assert done.stdout.splitlines() == ["[]", "['anyattn.adapters.plain']"], done.stderr
