"""`anyattn tune`: recordings, presets and grids are measured, resumed and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import anyattn
from anyattn.cli.app import app
from anyattn.cli.commands import tune as command
from anyattn.timings import known
from anyattn.timings.store import FOLDER
from anyattn.tuning import tuner
from anyattn.tuning.inputs import make_inputs

SMALL = ("--grid", "1,16:32,2,16", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    anyattn.reset()
    monkeypatch.setattr(tuner, "candidates", lambda *_: ["native", "native_math"])
    monkeypatch.setattr(command, "SECONDS", 0.02)
    return tmp_path


def tune(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "100"}, catch_exceptions=False)
    return done.exit_code, done.output


def tuned(*arguments: str) -> dict[str, Any]:
    code, text = tune(*arguments, "--json")
    assert code == 0, text
    found: dict[str, Any] = json.loads(text)
    assert found["ok"]
    return found


def test_grid_is_measured_stored_and_resumed() -> None:
    first = tuned(*SMALL)
    assert [call["spec"]["seqlen_q"] for call in first["calls"]] == [16, 32]
    for call in first["calls"]:
        assert call["measured"]
        assert {row["backend"] for row in call["rows"]} == {"native", "native_math"}
        times = {row["backend"]: row["seconds"] for row in call["rows"]}
        assert times[call["after"]] <= 1.02 * min(times.values())
        assert all(0 <= row["error"] <= 1 for row in call["rows"])
    assert Path(first["file"]).exists()
    second = tuned(*SMALL)
    assert [call["measured"] for call in second["calls"]] == [False, False]
    assert [call["rows"] for call in second["calls"]] == [call["rows"] for call in first["calls"]]
    third = tuned(*SMALL, "--again")
    assert third["calls"][0]["rows"] != first["calls"][0]["rows"]
    assert len(known.store().rows()) == 4


def test_what_was_measured_decides_in_later_programs() -> None:
    call = tuned(*SMALL)["calls"][0]
    anyattn.reset()
    q, k, v = (torch.randn(1, 16, 2, 16) for _ in range(3))
    decision = anyattn.explain(q, k, v, backend="auto")
    assert (decision.chosen, decision.basis) == (call["after"], "measured on this machine")


def test_recording_is_measured_and_each_kind_once(folder: Path) -> None:
    path = folder / "calls.json"
    q, k, v = (torch.randn(1, 24, 2, 16) for _ in range(3))
    with anyattn.record(path):
        for _ in range(3):
            anyattn.attention(q, k, v, anyattn.masks.Causal())
            anyattn.attention(q, k, v, backend="native_math")
        anyattn.attention(q, k, v, dropout_p=0.5, backend="native_math")
    found = tuned(str(path), "--device", "cpu")
    assert [call["spec"]["mask"]["pattern"] is not None for call in found["calls"]] == [True, False]
    assert [skipped["why"] for skipped in found["skipped"]] == [
        "dropout is random, so its result can't be compared with the reference"
    ]


def test_gradients_and_masks_of_a_grid_are_measured() -> None:
    found = tuned(*SMALL, "--grad", "--mask", "causal")
    keys = {row.key for row in known.store().rows()}
    assert len(found["calls"]) == 2
    assert {(key.mask, key.direction) for key in keys} == {("causal", "forward+backward")}


def test_budget_leaves_calls_out_and_the_next_run_goes_on() -> None:
    code, text = tune(*SMALL, "--budget", "0")
    assert code == 1
    assert "left 2 calls out" in text
    assert tuned(*SMALL, "--budget", "100")["left"] == 0


def test_people_read_what_changes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tuner._forward

    def forward(entry: Any, inputs: Any, **options: bool) -> Any:
        result = right(entry, inputs, **options)
        return result * 1.01 if entry.decision.chosen == "native" else result  # type: ignore[operator]

    monkeypatch.setattr(tuner, "_forward", forward)
    code, text = tune(*SMALL)
    assert code == 0
    assert "as the result of native was wrong" in text
    assert "times the error budget" in text
    assert "native_math" in text
    assert "2 choices changed" in text
    assert "timings.sqlite3" in text.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to measure"),
        (("--preset", "flux"), "There are: all, flux-1024"),
        (("--grid", "1,2,3"), "B,S,H,D"),
        (("--grid", "1,a,3,4"), "B,S,H,D"),
        (("nowhere.json",), "no recording"),
        ((*SMALL, "--precision", "int4"), "--precision"),
        ((*SMALL, "--mask", "cusal"), "Did you mean causal"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(arguments: tuple[str, ...], says: str) -> None:
    code, text = tune(*arguments, "--json")
    assert code == 2
    assert says in json.loads(text)["error"]["message"]


def test_file_that_is_no_recording_is_named(folder: Path) -> None:
    for text in ("{}", "[]", '{"calls": [{"spec": {}}]}', "what"):
        (folder / "x.json").write_text(text)
        assert tune(str(folder / "x.json"))[0] == 2


def test_presets_are_calls_whose_inputs_can_be_made() -> None:
    every = command.presets()
    assert len(every) >= 18
    for name, (_, spec) in zip(every, command._preset(["all"], torch.device("cpu"), grad=False), strict=True):
        # The lengths are cut, or a laptop would be busy for long; masks keep their kind.
        dense = spec.mask.dense
        q, kv = min(spec.seqlen_q, 32), min(spec.seqlen_kv, 32)
        if dense is not None:
            shape = (min(dense.shape[0], 1), min(dense.shape[1], spec.num_heads), q, kv)
            spec = spec.replace(mask=type(spec.mask)(dense=type(dense)(dense.kind, dense.dtype, shape)))
        small = spec.replace(batch=1, seqlen_q=q, seqlen_kv=kv, same_lengths=q == kv)
        assert make_inputs(small).query.shape[1] == q, name
