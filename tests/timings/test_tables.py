"""The shipped tables: what they hold, where they are used, and how a tool makes one from measurements."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import anyattn
from anyattn.environment import preset
from anyattn.selection import registry
from anyattn.timings.keys import Key, key_of
from anyattn.timings.store import Row, Store
from anyattn.timings.tables import HOST, read, table_for, tables, timings_of
from anyattn.types.spec import AttentionSpec, MaskSpec

KERNELS = {"fa3-fwd": "0.0.3", "flash-attn-4": "4.0.0b36"}
ROOT = Path(__file__).parents[2]


def machine(name: str) -> Any:
    return preset(name, packages=KERNELS, torch_version="2.11.0")


def spec_of(sizes: tuple[int, ...], mask: MaskSpec = MaskSpec(), **changes: Any) -> AttentionSpec:  # noqa: B008
    same = sizes[1] == sizes[2]
    spec = AttentionSpec(*sizes, torch.bfloat16, "cuda", sizes[5] ** -0.5, mask=mask, same_lengths=same)
    return spec.replace(**changes)


def test_tables_hold_times_of_backends_that_exist() -> None:
    assert {table.device for table in tables()} == {"NVIDIA H100", "NVIDIA H200"}
    for table in tables():
        assert "torch 2.11" in table.about
        for call, times in table.calls.items():
            assert set(times) <= set(registry.built_in_names())
            assert all(1e-6 < seconds < 1 for seconds in times.values()), call


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_each_unmasked_call_of_a_table_is_found_by_its_spec_and_decided_by_time(name: str) -> None:
    table = table_for(machine(name), "cuda")
    assert table is not None
    plain = {call: sizes for call, sizes in table.sizes.items() if call[1] == "none"}
    assert len(plain) >= 14
    for call, sizes in plain.items():
        grad = ("query", "key", "value") if call[3] == "forward+backward" else ()
        spec = spec_of(sizes, requires_grad=grad, captured=True)
        decision = anyattn.explain(spec, backend="auto", env=machine(name))
        times = table.calls[call]
        assert decision.timings is not None
        assert decision.basis == f"shipped table for {table.device}"
        right = {candidate.name for candidate in decision.candidates if candidate.admits}
        best = min(seconds for backend, seconds in times.items() if backend in right)
        assert times[str(decision.chosen)] <= 1.02 * best, call


def test_table_knows_what_the_rule_does_not() -> None:
    sizes = (64, 257, 257, 16, 16, 64, 64)
    decision = anyattn.explain(spec_of(sizes), backend="auto", env=machine("h200"))
    assert (decision.chosen, decision.basis) == ("flash3", "shipped table for NVIDIA H200")
    elsewhere = anyattn.explain(spec_of(sizes), backend="auto", env=machine("a100"))
    assert (elsewhere.chosen, elsewhere.timings) == ("native", None)
    padded = spec_of((1, 4992, 128, 32, 32, 64, 64), MaskSpec(key="lengths", prefix=True))
    assert anyattn.explain(padded, backend="auto", env=machine("h200")).chosen == "flash4"


def test_eager_call_needs_a_gain_above_what_the_host_may_cost() -> None:
    short = spec_of((1, 1536, 1536, 24, 24, 128, 128))
    env = machine("h200")
    key = key_of(short, env)
    assert key is not None
    timings = timings_of(short, env, key)
    assert timings is not None
    assert timings.least == HOST
    assert anyattn.explain(short, backend="auto", env=env).chosen == "native"
    assert anyattn.explain(short.replace(captured=True), backend="auto", env=env).chosen == "flash3"


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"rows": [{"sizes": [1] * 6, "mask": "", "dtype": "", "direction": "", "ms": {}}]}]
)
def test_table_of_another_form_is_refused(change: dict[str, Any]) -> None:
    plain = {"schema": 1, "device": "x", "names": ["x"], "about": "", "rows": []}
    assert read(plain).calls == {}
    with pytest.raises(ValueError):
        read({**plain, **change})


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("tables_tool", ROOT / "tools" / "gpu" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(backend: str, seconds: float, mode: str = "graph", error: float = 0.1, device: str = "GPU X") -> Row:
    key = Key(f"{device}, sm90", "", "none", "bfloat16", "forward", mode)  # type: ignore[arg-type]
    return Row(key, backend, "", (1, 128, 128, 8, 8, 64, 64), seconds, error=error)


def test_tool_makes_a_table_of_right_results_on_the_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [_row("native", 2e-3), _row("flash3", 1e-3), _row("sage", 1e-4, error=3.0)]
    rows += [_row("flash4", 1e-4, mode="eager"), _row("flash4", 1e-4, device="GPU Y")]
    Store(tmp_path / "timings.sqlite3").add(rows)
    out = tmp_path / "x.json"
    words = [str(tmp_path / "timings.sqlite3"), "--device", "GPU X", "--about", "one run", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tables.py", *words])
    _tool().main()
    made = read(json.loads(out.read_text()))
    assert made.calls == {("B1 Q128 K128 H8/8 D64/64", "none", "bfloat16", "forward"): {"flash3": 1e-3, "native": 2e-3}}
    Store(tmp_path / "timings.sqlite3").add([_row("native", 3e-3)])
    _tool().main()
    assert next(iter(read(json.loads(out.read_text())).calls.values()))["native"] == pytest.approx(3e-3)
    with pytest.raises(ValueError, match="GPU Z"):
        _tool().table_of(rows, "GPU Z", "")
