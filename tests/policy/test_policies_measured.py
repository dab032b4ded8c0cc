"""The benchmark of the ready-made policies runs, and the page shows what runs under verified/ found."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("policies_page", ROOT / "tools" / "docs" / "policies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_has_what_was_measured(writer: ModuleType) -> None:
    text = writer.PAGE.read_text(encoding="utf-8")
    assert text == writer.page(text, ROOT / "verified"), "write it anew with: python tools/docs/policies.py"
    assert text.count(writer.BEGIN) == text.count(writer.END) == 1


def test_benchmark_runs_each_policy_on_small_models_and_its_json_makes_a_table(
    writer: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers", reason="the benchmark runs models of Diffusers")
    folder = tmp_path / "verified" / "machine"
    folder.mkdir(parents=True)
    script = [sys.executable, str(ROOT / "benchmarks" / "policies.py"), "--small", "--rounds", "1", "--steps", "5"]
    done = subprocess.run(
        [*script, "--json", str(folder / "policies.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert writer.measured(tmp_path / "verified") == writer.NOTHING  # times of small models mean nothing
    run = json.loads((folder / "policies.json").read_text())
    for name, model in run["models"].items():
        assert set(model["ways"]) == {"stock", "auto", "policy"}, name
        kernels = model["ways"]["policy"]["kernels"]
        assert {kernel.partition(" (")[2] for kernel in kernels} == {
            "policy rule 'middle layers and steps')",
            "policy rule 'other attention of the transformer')",
        }
        assert all(0 < way["error"] < 1e-5 for way in model["ways"].values())
    run["about"]["small"] = False
    (folder / "policies.json").write_text(json.dumps(run))
    made = writer.page("before\n" + writer.BEGIN + writer.NOTHING + writer.END + "after\n", tmp_path / "verified")
    rows = [line for line in made.splitlines() if line.startswith(("| flux", "| wan", "| hunyuan_video"))]
    assert len(rows) == 9
    assert rows[0].startswith("| flux | 64 image and 7 text tokens | stock | ")
    assert made.startswith("before\n<!-- measured -->\n`verified/machine/policies.json`: cpu, torch ")
    assert made.endswith("<!-- end of measured -->\nafter\n")
