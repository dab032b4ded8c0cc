"""Cost curves: kernels of known cost are predicted, far calls aren't, and predictions make no choice worse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import anyattn
from anyattn.environment import detect, preset
from anyattn.timings import curves, known
from anyattn.timings.curves import FAR, GAIN, Curve, Curves, Point, filled, kind_of, moved, tiles, work
from anyattn.timings.keys import Key, key_of
from anyattn.timings.store import FOLDER, Row
from anyattn.timings.tables import tables
from anyattn.types.decision import Preference
from anyattn.types.spec import AttentionSpec


def sizes(length: int, *, batch: int = 2, keys: int | None = None, heads: int = 8) -> tuple[int, ...]:
    return (batch, length, length if keys is None else keys, heads, heads, 64, 64)


LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
COSTS = {
    "by operations": lambda call: 1e-12 * work(call),
    "by bytes": lambda call: 1e-11 * moved(call),
    "with a start": lambda call: 2e-5 + 1e-12 * work(call),
    "all three": lambda call: 1e-5 + 1e-12 * work(call) + 3e-12 * moved(call),
}


@pytest.mark.parametrize("name", COSTS)
def test_kernel_of_known_cost_is_predicted_between_what_was_measured(name: str) -> None:
    cost = COSTS[name]
    curve = Curve(Point(sizes(length), cost(sizes(length))) for length in LENGTHS)
    for length in (300, 700, 1500, 3000, 6000):
        found = curve.seconds(sizes(length))
        assert found is not None
        assert found == pytest.approx(cost(sizes(length)), rel=0.08), length


def test_measured_call_is_predicted_as_it_was_measured() -> None:
    times = [3e-5, 4e-5, 1e-4, 5e-4, 1.5e-3, 7e-3]
    curve = Curve(Point(sizes(length), seconds) for length, seconds in zip(LENGTHS, times, strict=True))
    for length, seconds in zip(LENGTHS, times, strict=True):
        assert curve.seconds(sizes(length)) == pytest.approx(seconds, rel=0.02)


def test_device_that_is_not_full_is_part_of_the_cost() -> None:
    def cost(call: tuple[int, ...]) -> float:
        return 1e-12 * work(call) / filled(call, 132)

    measured = [sizes(length, heads=heads) for length in (1024, 2048, 4096) for heads in (4, 8, 16)]
    curve = Curve([Point(call, cost(call)) for call in measured], units=132)
    few = sizes(2048, heads=5, batch=1)
    assert tiles(few) == 80
    assert filled(few, 132) == pytest.approx(80 / 132)
    found = curve.seconds(few)
    assert found == pytest.approx(cost(few), rel=0.1)
    blind = Curve([Point(call, cost(call)) for call in measured]).seconds(few)
    assert found is not None
    assert blind is not None
    assert abs(math.log(found / cost(few))) < abs(math.log(blind / cost(few)))


def test_call_far_from_all_that_was_measured_is_not_predicted() -> None:
    curve = Curve([Point(sizes(1024), 1e-3)])
    inside, outside = sizes(1024, batch=int(2 * FAR)), sizes(1024, batch=int(2 * FAR) + 1)
    assert curve.seconds(inside) is not None
    assert curve.seconds(outside) is None
    # The same work with far fewer keys.
    assert curve.seconds(sizes(1024, batch=16, keys=128)) is None
    with pytest.raises(ValueError, match="at least one"):
        Curve([])


def test_costs_are_never_negative() -> None:
    falling = Curve([Point(sizes(256), 4e-3), Point(sizes(512), 2e-3), Point(sizes(1024), 1e-3)])
    assert all(weight >= 0 for weight in falling.weights)
    assert all((falling.seconds(sizes(length)) or 0) > 0 for length in (200, 400, 700, 1800))


def key(mask: str = "none") -> Key:
    return Key("a machine", "", mask, "bfloat16", "forward", "graph")


def test_each_kind_of_call_has_curves_of_its_own_from_two_calls_on() -> None:
    kind = kind_of(sizes(512), "none", "bfloat16", "forward", "graph")
    points = [(kind, "fast", Point(sizes(length), 1e-6 * length)) for length in (512, 1024)]
    points += [(kind, "slow", Point(sizes(length), 4e-6 * length)) for length in (512, 1024)]
    points += [(kind, "once", Point(sizes(512), 1e-9))]
    found = Curves(points).predict(key(), sizes(700))
    assert set(found) == {"fast", "slow"}
    assert found["slow"] == pytest.approx(4 * found["fast"], rel=0.01)
    assert Curves(points).predict(key("causal"), sizes(700)) == {}
    assert Curves(points).predict(key(), (*sizes(700)[:5], 128, 128)) == {}
    assert Curves(points).predict(key(), (2, 700, 700, 8, 2, 64, 64)) == {}


def test_all_calls_of_a_bucket_are_predicted_alike() -> None:
    kind = kind_of(sizes(512), "none", "bfloat16", "forward", "graph")
    both = Curves((kind, "one", Point(sizes(length), 1e-6 * length)) for length in (512, 1024))
    assert both.predict(key(), sizes(641)) == both.predict(key(), sizes(768)) != both.predict(key(), sizes(769))


def test_what_this_machine_measured_decides_for_sizes_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    anyattn.reset()

    def spec(length: int) -> AttentionSpec:
        return anyattn.explain(*[torch.empty(1, length, 2, 16) for _ in range(3)]).spec

    rows = []
    for length in (256, 1024):
        stored = key_of(spec(length), detect())
        assert stored is not None
        call = (1, length, length, 2, 2, 16, 16)
        rows += [
            Row(stored, "native", "", call, 2e-9 * length**2),
            Row(stored, "native_math", "", call, 1e-9 * length**2),
        ]
    known.add(rows)
    decision = anyattn.explain(spec(600), backend="auto")
    assert decision.chosen == "native_math"
    assert "predicted from measurements on this machine" in str(decision)
    assert anyattn.explain(spec(8000), backend="auto").chosen == "native"


def test_predictions_from_the_rest_of_a_table_make_no_choice_worse() -> None:
    """Leave one call out, predict it from the others, and choose: the regret is never above that of the rule."""
    wish = Preference(("auto",), "prefer", "backend=")
    assert wish.mode == "prefer"
    for name in ("h100", "h200"):
        kernels = {"fa3-fwd": "0.0.3", "flash-attn-4": "4.0.0b36"}
        machine = preset(name, packages=kernels, torch_version="2.11.0")
        table = next(table for table in tables() if table.names[0] == machine.devices[1].name)
        regrets, errors = [], []
        for call, times in table.calls.items():
            if call[1] not in ("none", "causal") or call[3] != "forward":
                continue
            mine = table.sizes[call]
            rest = [
                (kind_of(table.sizes[other], *other[1:], mode=""), backend, Point(table.sizes[other], seconds))
                for other, found in table.calls.items()
                if other != call
                for backend, seconds in found.items()
            ]
            predicted = Curves(rest, 132).predict(Key("", "", *call[1:], "graph"), mine, mode="")  # type: ignore[arg-type]
            errors += [abs(math.log(predicted[backend] / times[backend])) for backend in predicted if backend in times]
            long = mine[0] * mine[3] * mine[1] * mine[2] * mine[5] >= 1 << 35
            before = next(backend for backend in (("flash3", "native") if long else ("native",)) if backend in times)
            fastest = min(predicted, key=lambda backend: predicted[backend], default=before)
            better = before in predicted and predicted[fastest] * GAIN <= predicted[before] and fastest in times
            after = fastest if better else before
            regrets.append((times[after] / min(times.values()), times[before] / min(times.values())))
        assert len(regrets) >= 14
        assert all(after <= before for after, before in regrets)
        assert sorted(errors)[len(errors) // 2] < 0.15
    assert curves.FEWEST == 2
