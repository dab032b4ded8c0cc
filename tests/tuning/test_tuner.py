"""Calls are measured with every backend that `auto` may take, wrong results left out, and choices follow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import anyattn
from anyattn import masks
from anyattn.environment import detect
from anyattn.pins.pins import live_scope
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.timings import known
from anyattn.timings.keys import key_of
from anyattn.timings.store import FOLDER, Row
from anyattn.tuning import in_place, tuner
from anyattn.tuning.inputs import make_inputs
from anyattn.tuning.tuner import Tuned, candidates, measured_before, tune
from anyattn.types.spec import AttentionSpec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    anyattn.reset()
    monkeypatch.setenv("ANYATTN_TUNE_BUDGET_MS", "20000")
    in_place._tried.clear()
    return tmp_path


def scope() -> defaults.Scope:
    return live_scope(defaults.current.get())


def spec(length: int = 64, *, grad: bool = False, mask: object = None) -> AttentionSpec:
    tensors = [torch.randn(2, length, 4, 32, requires_grad=grad) for _ in range(3)]
    return anyattn.explain(*tensors, mask).spec  # type: ignore[arg-type]


def tuned(described: AttentionSpec, **options: object) -> Tuned:
    return tune(described, make_inputs(described), scope(), seconds=0.05, **options)  # type: ignore[arg-type]


QUICK = ["native", "native_math", "native_flash"]
MASKS = {
    "none": None,
    "causal": masks.Causal(),
    "padding": masks.KeyPadding(torch.rand(2, 64) > 0.3),
    "bias": torch.randn(1, 4, 64, 64),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_each_backend_is_compared_timed_and_stored(name: str, grad: bool) -> None:
    described = spec(grad=grad, mask=MASKS[name])
    names = [name for name in candidates(described, scope()) if name in QUICK]
    found = tuned(described, names=names)
    assert not found.failed
    assert not found.wrong
    assert {row.backend for row in found.rows} == set(names)
    for row in known.rows_of(found.rows[0].key):
        assert row.seconds is not None
        assert row.error is not None
        assert 0 < row.seconds < 1
        assert 0 <= row.error <= 1
        assert row.first_call is not None
        assert (row.key.mode, row.key.direction) == ("eager", "forward+backward" if grad else "forward")
    fastest = min(found.rows, key=lambda row: row.seconds or 0.0)
    own = next(row for row in found.rows if row.backend == found.after)
    assert (own.seconds or 0.0) <= 1.02 * (fastest.seconds or 0.0)
    assert found.decision.timings is not None


def test_candidates_are_what_auto_may_take_flex_among_them() -> None:
    names = candidates(spec(), scope())
    assert {"native", "native_math", "flex"} <= set(names)
    assert not any(registry.get(name).downloads for name in names)


def test_backend_that_gives_wrong_results_is_never_timed_or_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    described = spec()
    right = tuner._forward

    def forward(entry: object, inputs: object, **options: bool) -> object:
        result = right(entry, inputs, **options)  # type: ignore[arg-type]
        wrong = entry.decision.chosen == "native"  # type: ignore[attr-defined]
        return result * 1.01 if wrong else result  # type: ignore[operator]

    monkeypatch.setattr(tuner, "_forward", forward)
    found = tuned(described, names=QUICK)
    assert list(found.wrong) == ["native"]
    assert found.wrong["native"] > 1
    assert (found.before, found.after) == ("native", found.decision.chosen)
    assert found.after != "native"
    assert "inexact" in {reason.code for reason in found.decision.reasons("native")}
    # It may be measured again, since a later version may be right.
    assert "native" in candidates(described, scope())
    monkeypatch.undo()
    monkeypatch.setenv(FOLDER, str(known.store().path.parent))  # type: ignore[union-attr]
    assert "native" in {row.backend for row in tuned(described, names=QUICK).rows}


def test_backend_that_raises_is_noted_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tuner._forward

    def forward(entry: object, inputs: object, **options: bool) -> object:
        if entry.decision.chosen == "native_math":  # type: ignore[attr-defined]
            raise RuntimeError("no such kernel")
        return right(entry, inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner, "_forward", forward)
    found = tuned(spec(), names=QUICK)
    assert found.failed == {"native_math": "RuntimeError: no such kernel"}
    assert {row.backend for row in found.rows} == {"native", "native_flash"}


def test_call_that_was_measured_whole_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    described = spec()
    monkeypatch.setattr(tuner, "candidates", lambda *_: QUICK)
    assert measured_before(described, scope()) is None
    tuned(described, names=QUICK[:2])
    assert measured_before(described, scope()) is None
    tuned(described, names=QUICK)
    assert {row.backend for row in measured_before(described, scope()) or ()} == set(QUICK)


def test_nothing_is_measured_in_a_transform_or_with_the_value_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    described = spec()
    inputs = make_inputs(described)

    def under(query: torch.Tensor) -> torch.Tensor:
        with pytest.raises(anyattn.InvalidCallError, match="plain eager"):
            tune(described, inputs._replace(query=query), scope())
        return query

    torch.func.vmap(under)(inputs.query[None])
    monkeypatch.setenv(defaults.ENV_CHECKS, "1")
    anyattn.reset()
    with pytest.raises(anyattn.InvalidSettingError, match="ANYATTN_CHECKS"):
        tuned(described)


def rows() -> list[Row]:
    return known.store().rows()


def test_call_is_measured_in_place_once_and_only_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_TUNE", "1")
    q, k, v = (torch.randn(2, 64, 4, 32) for _ in range(3))
    anyattn.attention(q, k, v)
    assert rows() == []
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    out = anyattn.attention(q, k, v, backend="auto")
    assert torch.equal(torch.rand(3), wanted)
    assert torch.allclose(out, anyattn.attention(q, k, v, backend="native_math"), atol=1e-5)
    found = rows()
    assert {row.source for row in found} == {"ANYATTN_TUNE"}
    assert {"native", "native_math"} <= {row.backend for row in found}
    assert "flex" not in {row.backend for row in found}
    decision = anyattn.explain(q, k, v, backend="auto")
    assert decision.basis == "measured on this machine"
    anyattn.reset()
    anyattn.attention(q, k, v, backend="auto")
    assert rows() == found


def test_gradients_are_measured_in_place_without_touching_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_TUNE", "1")
    q, k, v = (torch.randn(2, 64, 4, 32, requires_grad=True) for _ in range(3))
    anyattn.attention(q, k, v, backend="auto").sum().backward()
    assert {row.key.direction for row in rows()} == {"forward+backward"}
    grads = [tensor.grad for tensor in (q, k, v)]
    q2, k2, v2 = (tensor.detach().clone().requires_grad_() for tensor in (q, k, v))
    anyattn.attention(q2, k2, v2, backend="native_math").sum().backward()
    for mine, right in zip(grads, (q2.grad, k2.grad, v2.grad), strict=True):
        assert mine is not None
        assert right is not None
        assert torch.allclose(mine, right, atol=1e-4)


@pytest.mark.parametrize("value", ["0", "off", ""])
def test_off_measures_nothing(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ANYATTN_TUNE", value)
    anyattn.attention(*[torch.randn(1, 8, 2, 16)] * 3, backend="auto")
    assert rows() == []


def test_wrong_settings_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    call = [torch.randn(1, 8, 2, 16)] * 3
    monkeypatch.setenv("ANYATTN_TUNE", "please")
    with pytest.raises(anyattn.InvalidSettingError, match="ANYATTN_TUNE"):
        anyattn.attention(*call, backend="auto")
    monkeypatch.setenv("ANYATTN_TUNE", "1")
    for word in ("soon", "-3", "0", "inf"):
        monkeypatch.setenv("ANYATTN_TUNE_BUDGET_MS", word)
        in_place._tried.clear()
        with pytest.raises(anyattn.InvalidSettingError, match="BUDGET_MS"):
            anyattn.attention(*call, backend="auto")
    monkeypatch.setenv("ANYATTN_TUNE_BUDGET_MS", "50")
    assert in_place.budget() == 0.05


def test_process_group_means_that_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANYATTN_TUNE", "1")
    call = [torch.randn(1, 8, 2, 16)] * 3
    store = torch.distributed.FileStore(str(tmp_path / "group"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        anyattn.attention(*call, backend="auto")
        assert rows() == []
        # What was measured before counts all the same.
        described = anyattn.explain(*call).spec
        key = key_of(described, detect())
        assert key is not None
        sizes = (1, 8, 8, 2, 2, 16, 16)
        known.add([Row(key, "native", "", sizes, 2e-3), Row(key, "native_math", "", sizes, 1e-3)])
        assert anyattn.explain(*call, backend="auto").chosen == "native_math"
    finally:
        torch.distributed.destroy_process_group()
    anyattn.reset()


def test_nothing_is_measured_under_compile_transforms_and_tracers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_TUNE", "1")

    def attend(tensor: torch.Tensor) -> torch.Tensor:
        return anyattn.attention(tensor, tensor, tensor, backend="auto")

    tensor = torch.randn(1, 8, 2, 16)
    torch.compile(attend, backend="eager", fullgraph=True)(tensor)
    torch.func.vmap(attend)(tensor[None])
    torch.func.grad(lambda given: attend(given).sum())(tensor)
    torch.jit.trace(attend, tensor, check_trace=False)
    attend(torch.randn(1, 8, 2, 16, device="meta"))
    assert rows() == []
    attend(tensor)
    assert rows()


def test_slow_calls_are_not_measured_in_place_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_TUNE", "1")
    monkeypatch.setenv("ANYATTN_TUNE_BUDGET_MS", "20")
    q, k, v = (torch.randn(1, 1500, 8, 64) for _ in range(3))
    start = time.perf_counter()
    anyattn.attention(q, k, v, backend="native")
    alone = time.perf_counter() - start
    start = time.perf_counter()
    anyattn.attention(q, k, v, backend="auto")
    # The first calls, the comparison with the reference and a second call; never dozens of calls.
    assert time.perf_counter() - start < 12 * alone + 2
    assert rows() == []
