"""A recording says which kernel ran, in which layer, how often and how long; and costs nothing while there is none."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anyattn
from anyattn.errors import InvalidCallError
from anyattn.records.calls import Calls


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8))
        return anyattn.attention(q, q, q).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attend(), Attend()])
        self.last = nn.Sequential(nn.Identity(), Attend())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Processor:
    """Computes a layer's attention outside of it, as Diffusers' do."""

    def __call__(self, attn: nn.Module, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8))
        return anyattn.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3).transpose(1, 2).flatten(2)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def _x(length: int = 5) -> Tensor:
    return torch.randn(2, length, 16)


def test_each_call_has_its_layer_by_its_name_in_the_model() -> None:
    model = Model()
    with anyattn.record() as calls:
        model(_x())
        anyattn.attention(*(torch.randn(1, 3, 2, 8),) * 3)
    assert calls.layers == ["Model.blocks.0", "Model.blocks.1", "Model.last.1", "(no module)"]
    assert [call.chosen for call in calls] == ["native"] * 4


def test_layer_of_a_processor_is_the_module_that_calls_it() -> None:
    model = nn.ModuleDict({"attn1": Held()})
    with anyattn.record() as calls:
        model["attn1"](_x())
    assert calls.layers == ["Held"]


def test_part_that_is_not_registered_is_named_by_its_class() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = (Attend(),)

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](x)  # type: ignore[no-any-return]

    with anyattn.record() as calls:
        Outer()(_x())
    assert calls.layers == ["Outer > Attend"]


def test_module_that_is_added_later_is_found() -> None:
    model = Model()
    with anyattn.record() as calls:
        model(_x())
        model.blocks.append(Attend())
        model(_x())
    assert calls.layers[3:] == ["Model.blocks.0", "Model.blocks.1", "Model.blocks.2", "Model.last.1"]


def test_pinned_layers_and_packed_calls_are_named_too() -> None:
    class Packed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
            q = x[0].unflatten(-1, (2, 8))
            return anyattn.attention_varlen(q, q, q, lengths, lengths, 3, 3)

    model = nn.Sequential(Attend(), Attend())
    anyattn.set_attention_backend(model[1], "native_math")
    packed = nn.ModuleList([Packed()])
    with anyattn.record() as calls:
        model(_x())
        packed[0](_x())
    assert calls.layers == ["Sequential.0", "Sequential.1", "Packed"]
    assert [row.backend for row in calls.rows()] == ["native", "native_math", calls[2].chosen]
    assert [row.source for row in calls.rows()][:2] == ["built-in", "model"]


def test_rows_join_like_calls_and_the_table_shows_them() -> None:
    model = Model()
    with anyattn.record() as calls:
        for length in (5, 5, 7):
            model(_x(length))
    rows = {(row.layer, row.count) for row in calls.rows()}
    assert rows == {(f"Model.{name}", count) for name in ("blocks.0", "blocks.1", "last.1") for count in (1, 2)}
    lines = str(calls).splitlines()
    assert lines[0].split() == ["layer", "backend", "calls", "call"]
    assert len(lines) == 7
    assert repr(calls) == str(calls)
    assert all(row.seconds is None for row in calls.rows())


def test_table_of_many_layers_says_how_many_more_there_are() -> None:
    with anyattn.record() as calls:
        for length in range(1, 51):
            anyattn.attention(*(torch.randn(1, length, 2, 8),) * 3)
    assert str(calls).splitlines()[-1].startswith("and 10 more")


def test_times_are_those_of_each_call() -> None:
    short, long = torch.randn(1, 8, 1, 8), torch.randn(2, 900, 4, 64)
    for q in (short, long):
        anyattn.attention(q, q, q)
    with anyattn.record(times=True) as calls:
        for q in (short, long, long):
            anyattn.attention(q, q, q)
    seconds = calls.seconds
    assert all(span is not None and 0 < span < 60 for span in seconds)
    assert calls.rows()[0].count == 2, "what takes longest comes first"
    assert calls.rows()[0].seconds == pytest.approx(sum(seconds[1:]))
    assert str(calls).splitlines()[0].split()[3:6] == ["ms", "ms", "each"]


def test_only_the_record_that_asks_for_times_has_them() -> None:
    q = torch.randn(1, 8, 1, 8)
    with anyattn.record() as outer, anyattn.record(times=True) as inner:
        anyattn.attention(q, q, q)
    assert outer.seconds == [None]
    assert inner.seconds[0] is not None


def test_call_that_fails_is_recorded_without_a_time() -> None:
    q = torch.randn(1, 8, 1, 8)
    with anyattn.record(times=True) as calls, pytest.raises(InvalidCallError):
        anyattn.attention(q, q, q, dropout_p=2.0)
    assert calls == []
    assert str(calls) == "no calls were recorded"


def test_file_gets_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    with anyattn.record(path, times=True) as calls:
        Model()(_x())
    found = json.loads(path.read_text())
    assert found["schema"] == 1
    assert {row["layer"] for row in found["calls"]} == set(calls.layers)
    assert found["calls"][0]["spec"]["seqlen_q"] == 5
    assert found["calls"][0]["ms"] > 0


def test_file_is_written_after_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "calls.json"

    def fail() -> None:
        with anyattn.record(path):
            Model()(_x())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(json.loads(path.read_text())["calls"]) == 3


def test_one_object_entered_in_two_threads_keeps_both_apart(tmp_path: Path) -> None:
    recording = anyattn.record()
    both, inside = threading.Barrier(2), {}

    def work(name: str, length: int) -> None:
        with recording as calls:
            both.wait()
            anyattn.attention(*(torch.randn(1, length, 2, 8),) * 3)
            both.wait()
        inside[name] = [call.spec.seqlen_q for call in calls]

    threads = [threading.Thread(target=work, args=(name, length)) for name, length in (("a", 3), ("b", 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == {"a": [3], "b": [4]}


def test_stack_is_not_walked_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("the stack was walked")

    monkeypatch.setattr("anyattn.records.layers.Layers.running", fail)
    Model()(_x())
    with anyattn.record(), pytest.raises(AssertionError, match="the stack was walked"):
        Model()(_x())


def test_picture_shows_layers_and_backends(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = Model()
    anyattn.set_attention_backend(model.last, "native_math")
    for times in (False, True):
        with anyattn.record(times=times) as calls:
            model(_x())
        path = tmp_path / f"calls-{times}.svg"
        calls.plot(path)
        assert path.stat().st_size > 5000


def test_picture_of_nothing_and_without_matplotlib_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidCallError, match="no call was recorded"):
        Calls().plot(tmp_path / "a.png")
    with anyattn.record() as calls:
        Model()(_x())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidCallError, match=r"pip install \"anyattn\[plots\]\""):
        calls.plot(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
