"""What a choice knows of times: from the file, of the same kernel and machine, read once, and nothing without it."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import anyattn
from anyattn.environment import detect, preset, supposed
from anyattn.run import lengths
from anyattn.timings import known, tables
from anyattn.timings.keys import key_of, sizes_of
from anyattn.timings.store import FOLDER, Row
from anyattn.types.spec import AttentionSpec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    anyattn.reset()
    return tmp_path


def tensors(length: int = 8) -> list[torch.Tensor]:
    return [torch.randn(1, length, 2, 16) for _ in range(3)]


def measured(spec: AttentionSpec, backend: str, seconds: float | None, **changes: object) -> Row:
    key = key_of(spec, detect())
    assert key is not None
    row = Row(key, backend, "", sizes_of(spec), seconds, error=0.5, time=time.time() - 3 * 86400 - 60)
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_auto_runs_what_was_measured_to_be_faster() -> None:
    q, k, v = tensors()
    plain = anyattn.explain(q, k, v, backend="auto")
    assert (plain.chosen, plain.timings) == ("native", None)
    assert known.add([measured(plain.spec, "native", 2e-3), measured(plain.spec, "native_math", 1e-3)])
    anyattn.reset()
    decision = anyattn.explain(q, k, v, backend="auto")
    assert decision.chosen == "native_math"
    assert "measured on this machine 3 days ago" in str(decision)
    with anyattn.record() as calls:
        anyattn.attention(q, k, v, backend="auto")
    assert calls[0].chosen == "native_math"
    # Another name, and a call of another bucket, are as before.
    assert anyattn.explain(q, k, v).chosen == "native"
    assert anyattn.explain(*tensors(64), backend="auto").chosen == "native"


def test_measurement_of_another_version_of_a_kernel_does_not_count() -> None:
    spec = anyattn.explain(*tensors()).spec
    known.add([measured(spec, "native", 2e-3), measured(spec, "native_math", 1e-3, kernel="torch-math 0.1")])
    assert anyattn.explain(spec, backend="auto").timings is None
    known.add([measured(spec, "gone", 1e-9)])
    assert anyattn.explain(spec, backend="auto").timings is None or "gone" not in str(
        anyattn.explain(spec, backend="auto")
    )


def test_measurement_of_another_machine_does_not_count() -> None:
    spec = anyattn.explain(*tensors()).spec
    known.add([measured(spec, "native", 2e-3), measured(spec, "native_math", 1e-3)])
    with supposed(dataclasses.replace(detect(), processor="another one, 3 threads")):
        assert anyattn.explain(spec, backend="auto").chosen == "native"
    assert anyattn.explain(spec, backend="auto", env=preset("cpu")).chosen == "native"


def test_wrong_result_is_left_out_and_explained() -> None:
    spec = anyattn.explain(*tensors()).spec
    known.add([measured(spec, "native", None, error=3.5), measured(spec, "native_math", 1e-3)])
    decision = anyattn.explain(spec, backend="auto")
    assert decision.chosen != "native"
    assert "inexact" in {reason.code for reason in decision.reasons("native")}
    assert "3.5 times the budget" in str(decision)


def test_file_is_read_once_and_again_after_reset() -> None:
    spec = anyattn.explain(*tensors()).spec
    assert anyattn.explain(spec, backend="auto").chosen == "native"
    # Another process writes.
    known.store().add([measured(spec, "native", 2e-3), measured(spec, "native_math", 1e-3)])
    assert anyattn.explain(spec, backend="auto").chosen == "native"
    anyattn.reset()
    assert anyattn.explain(spec, backend="auto").chosen == "native_math"


def test_damaged_file_fails_no_call(folder: Path) -> None:
    (folder / "timings.sqlite3").write_bytes(b"what" * 4096)
    with pytest.warns(anyattn.AnyattnWarning, match="unreadable"):
        anyattn.attention(*tensors(), backend="auto")


def decode(length: int) -> None:
    keys = torch.randn(1, length, 2, 16)
    anyattn.attention(torch.randn(1, 1, 2, 16), keys, keys, backend="auto")


def served() -> list[bool]:
    """Say of each range of lengths that was tried whether one decision serves it."""
    ranges = [found for found in gc.get_objects() if isinstance(found, lengths.Range)]
    return [entry is not None for found in ranges for entry in found.entries.values()]


def test_growing_cache_is_decided_by_bucket_where_times_differ_inside_a_range() -> None:
    for length in range(130, 256):
        decode(length)
    assert True in served()
    # In the middle of the power of two alone, another backend is faster.
    keys = torch.randn(1, 200, 2, 16)
    middle = anyattn.explain(torch.randn(1, 1, 2, 16), keys, keys).spec
    known.add([measured(middle, "native", 2e-3), measured(middle, "native_math", 1e-3)])
    anyattn.reset()
    gc.collect()
    for length in range(130, 256):
        decode(length)
    assert True not in served()
    for length in range(130, 256):
        with anyattn.record() as calls:
            decode(length)
        assert calls[0].chosen == ("native_math" if 192 < length <= 224 else "native"), length


def test_import_and_calls_of_a_named_backend_read_no_file_and_import_no_database() -> None:
    code = "import sys, torch, anyattn; q = torch.randn(1, 8, 2, 16); anyattn.attention(q, q, q); "
    code += "print('sqlite3' in sys.modules, any('anyattn.timings' in name or 'platformdirs' in name for name in "
    code += "sys.modules), any('anyattn.tuning' in name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3


def test_tables_are_for_the_gpus_that_they_name_alone() -> None:
    for name in ("a100", "t4", "b200", "mi300", "cpu"):
        device_type = "cpu" if name == "cpu" else "cuda"
        assert tables.table_for(preset(name), device_type) is None
        assert not known.knows(preset(name), device_type, here=False)
