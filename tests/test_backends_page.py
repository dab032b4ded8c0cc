"""docs/backends.md tells any declaration, and of verified/ what the files say: a double is told as a double."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from anyattn.adapters.flash2 import Flash2
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend
from anyattn.selection import registry

TOOLS = Path(__file__).parents[1] / "tools" / "docs"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backends_page", TOOLS / "backends.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def _law(**fields: Any) -> dict[str, Any]:
    return {"law": "right", "run": 5, "passed": 5, "refused": 2, "worst": 0.5, "failures": []} | fields


REJECTED = _law(law="rejected", run=100)


@pytest.fixture
def read(tool: ModuleType, tmp_path: Path) -> Any:
    def of(data: Any) -> Any:
        folder = tmp_path / "somewhere"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(data))
        return tool.read_runs(tmp_path)

    return of


def test_verify_file_is_read(read: Any) -> None:
    failed = _law(law="halves", failures=[{"what": "off"}, {"what": "off", "cases": 3}])
    rows = [
        {"backend": "native", "ran": "kernel", "laws": [_law(), failed, REJECTED]},
        {"backend": "flash2", "ran": "contract double", "laws": [_law()]},
    ]
    one, two = read({"device": "cuda", "machine": "a GPU", "torch": "2.11", "backends": rows})
    assert (one.backend, one.device_type, one.device, one.torch) == ("native", "cuda", "a GPU", "2.11")
    assert (one.executed, one.broken, one.died, one.double) == (10, 4, 0, False)
    assert one.outcome == "10 executed, 4 broken"
    assert two.double


@pytest.mark.parametrize("trimmed", [False, True])
def test_file_of_the_gpu_tool_is_read(read: Any, trimmed: bool) -> None:
    laws: Any = [_law(), {"law": "halves", "outcome": "DIED", "returncode": -6}, REJECTED]
    if trimmed:
        laws = {law.pop("law"): law for law in (dict(law) for law in laws)}
    devices = [{"type": "cpu", "name": "x"}, {"type": "cuda", "name": "an H100"}]
    about = {"device": "cuda:0", "torch": "2.11", "devices": devices}
    (run,) = read({"about": about, "laws": {"flash2": {"status": "failed", "laws": laws}}, "commit": "abc"})
    assert (run.backend, run.device_type, run.device, run.note) == ("flash2", "cuda", "an H100", "abc")
    assert (run.executed, run.broken, run.died, run.worst) == (5, 0, 1, 0.5)
    assert run.outcome == "5 executed, 1 died"


@pytest.mark.parametrize("data", [[1, 2], {"rows": {}}, {"about": {}, "laws": {"native": "DIED"}}, {"models": []}])
def test_file_without_laws_says_nothing(read: Any, data: Any) -> None:
    assert read(data) == []


def test_double_is_never_told_as_a_run_of_the_kernel(tool: ModuleType, read: Any) -> None:
    row = next(row for row in tool.built_rows() if row.backend.name == "flash2")
    assert tool._verified(row, []) == "contract double in CI alone"
    data = {"device": "cpu", "machine": "x", "torch": "2.13", "backends": []}
    data["backends"] = [{"backend": "flash2", "ran": "contract double", "laws": [_law()]}]
    assert tool._verified(row, read(data)) == "contract double in CI alone"
    data["device"] = "cuda"
    assert tool._verified(row, read(data)) == "contract double in CI alone"
    del data["backends"][0]["ran"]
    assert tool._verified(row, read(data)) == "x, torch 2.13: 5 executed, none broken"
    page = tool.page(runs=read(data))
    assert "| `flash2` | kernel | x | 2.13 | 5 executed, none broken | 0.50 | `verified/somewhere/run.json` |" in page


def test_any_declaration_can_be_told(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Backend):
        name = "xla"
        declarations = {"xla": Capabilities(), "cuda": Capabilities(rocm=True, quantised="int8", arch_max=(9, 0))}

    class Exact(Flash2):
        name = "flash3"
        declarations = {
            "cuda": Flash2.declarations["cuda"].replace(arch_min=(9, 0), arch_max=(9, 0), boolean=True),
            "cpu": Flash2.declarations["cuda"].replace(dtypes=frozenset((torch.float8_e4m3fn,))),
        }

    monkeypatch.setattr(registry, "BUILTIN", {"xla": "", "flash3": ""})
    monkeypatch.setattr(registry, "get", {"xla": Bare(), "flash3": Exact()}.get)
    monkeypatch.setattr(tool, "DOUBLES", {"flash3": ""})
    page = tool.page(runs=[])
    lines = [line for line in page.splitlines() if line.startswith(("| `xla`", "| `flash3`"))]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert any(" cuda sm90 |" in line and "bf16, fp16" in line for line in lines)
    assert any("computed in int8" in line and "cuda (AMD too)" in line for line in lines)
    assert any("float8_e4m3fn" in line for line in lines)
    assert any("lower right; other said so where that is exact, else turned dense" in line for line in lines)
    verified = {line.split("|")[1].strip(" `"): line.split("|")[-2].strip() for line in lines if " run |" in line}
    assert verified == {"xla": "never run"}
    assert any("| `flash3`" in line and line.endswith("| contract double in CI alone |") for line in lines)


def test_page_lists_every_built_backend(tool: ModuleType) -> None:
    assert {row.backend.name for row in tool.built_rows()} == set(registry.BUILTIN)
    assert "no run on a GPU" not in tool.page()
