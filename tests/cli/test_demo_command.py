"""`anyattn demo`: what the demo finds reaches the person, the program and the exit code."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="the demo needs the extra anyattn[demo]")
pytest.importorskip("PIL", reason="the demo needs the extra anyattn[demo]")

from anyattn import demo as demos
from anyattn.cli.app import app
from anyattn.cli.commands import demo as command
from anyattn.demo import BackendRun, DemoResult, Errors, ModelResult


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "80"})


def result_of(*runs):
    model = ModelResult(
        name="flux",
        title="FLUX",
        calls=7,
        image=torch.zeros(1, 3, 8, 8),
        truth_seconds=0.5,
        plain=Errors(1e-6, 1e-6),
        budget=Errors(2e-6, 2e-6),
        runs=runs,
    )
    return DemoResult("cpu", "float32", 3, 0, (model,))


PASSED = BackendRun(
    "native", True, "passed", calls=7, seconds=0.1, errors=Errors(1e-6, 1e-6), image=torch.zeros(1, 3, 8, 8)
)
FAILED = BackendRun(
    "flex",
    True,
    "failed",
    reason="latents off by nan [not markup]",
    calls=7,
    seconds=0.1,
    errors=Errors(float("nan"), 1.0),
    image=torch.zeros(1, 3, 8, 8),
)
REFUSED = BackendRun("native_flash", True, "refused", reason="mask: needs this, got that")


def test_real_pipeline_runs_and_its_pictures_are_written(tmp_path):
    answer = invoke(
        "--model", "flux", "--backend", "native", "--steps", "1", "--device", "cpu", "--out", str(tmp_path), "--json"
    )
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["ok"] is True
    assert [model["name"] for model in found["models"]] == ["flux"]
    assert [run["status"] for run in found["models"][0]["runs"]] == ["passed"]
    assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert found["sheet"] == str(tmp_path / "contact_sheet.png")


@pytest.mark.parametrize(("runs", "code"), [((PASSED,), 0), ((PASSED, REFUSED), 0), ((PASSED, FAILED), 1)])
def test_exact_backend_outside_the_budget_decides_the_exit_code(monkeypatch, tmp_path, runs, code):
    monkeypatch.setattr(demos, "run_demo", lambda *a, **k: result_of(*runs))
    answer = invoke("--out", str(tmp_path))
    assert answer.exit_code == code
    for run in runs:
        assert run.backend in answer.stdout
        assert run.reason in answer.stdout
    assert max(map(len, answer.stdout.splitlines())) <= 80
    assert json.loads(invoke("--out", str(tmp_path), "--json").stdout)["ok"] is (code == 0)


def test_options_reach_the_demo(monkeypatch, tmp_path):
    seen = {}

    def run_demo(models, backends, **options):
        seen.update(options, models=models, backends=backends)
        options["progress"](demos.Progress("FLUX", "native", 1, 3))
        return result_of(PASSED)

    monkeypatch.setattr(demos, "run_demo", run_demo)
    steps = []
    command.demo(
        tmp_path,
        models=["flux", "wan"],
        backends=["flex_attn"],
        device="cpu",
        dtype="bfloat16",
        steps=2,
        seed=5,
        progress=steps.append,
    )
    seen.pop("progress")
    assert seen == {
        "models": ("flux", "wan"),
        "backends": ("flex_attn",),
        "device": "cpu",
        "dtype": torch.bfloat16,
        "steps": 2,
        "seed": 5,
    }
    assert [(step.text, step.done, step.total) for step in steps] == [("FLUX: native", 1, 3)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "fluxx"), "flux, sd3"),
        (("--backend", "flsh"), "Did you mean"),
        (("--dtype", "floaty"), "--dtype"),
        (("--device", "nowhere"), "--device"),
        (("--steps", "0"), "steps"),
    ],
)
def test_bad_usage_is_one_message_and_code_2(tmp_path, arguments, says):
    answer = invoke("--out", str(tmp_path), *arguments)
    assert answer.exit_code == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demos, "run_demo", lambda *a, **k: pytest.fail("the demo ran"))
    (tmp_path / "file").write_text("")
    answer = invoke("--out", str(tmp_path / "file"))
    assert answer.exit_code == 2
    assert "give a folder" in answer.stderr
