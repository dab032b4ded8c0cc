"""`anyattn record SCRIPT` runs a script as Python does, and prints what it called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anyattn.cli.app import app

SCRIPT = """
import sys, torch, anyattn, helper
q = torch.randn(1, int(sys.argv[2]), 2, 8)
anyattn.attention(q, q, q, backend=helper.BACKEND)
print(sys.argv[1:], __name__)
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("BACKEND = 'native_math'")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("code", [0, 3])
def test_script_has_its_arguments_and_ends_with_its_own_code(script: Path, code: int) -> None:
    out, before = script.parent / "calls.json", (sys.argv, sys.path[:])
    done = CliRunner().invoke(app, ["record", "--times", "--out", str(out), str(script), "--length", "7", str(code)])
    assert done.exit_code == code, done.output
    assert f"['--length', '7', '{code}'] __main__" in done.output
    assert "native_math" in done.output
    assert (sys.argv, sys.path) == before
    (row,) = json.loads(out.read_text())["calls"]
    assert (row["backend"], row["spec"]["seqlen_q"], row["count"]) == ("native_math", 7, 1)
    assert row["ms"] > 0


def test_script_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["record", str(tmp_path / "none.py")])
    assert done.exit_code == 2
    assert "There is no script" in done.output


def test_script_that_raises_leaves_its_error_and_its_rows(script: Path) -> None:
    script.write_text(SCRIPT.replace("sys.exit(int(sys.argv[3]))", "1 / 0"))
    out = script.parent / "calls.json"
    done = CliRunner().invoke(app, ["record", "--out", str(out), str(script), "--length", "7"])
    assert isinstance(done.exception, ZeroDivisionError)
    assert len(json.loads(out.read_text())["calls"]) == 1
