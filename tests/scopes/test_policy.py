"""Who decides: call, pin, block, default, environment; and that nothing leaks between threads, tasks or models."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anyattn
from anyattn.pins import pins
from anyattn.selection import registry


def call(**options: Any) -> str:
    q = torch.randn(1, 4, 2, 8)
    with anyattn.record() as calls:
        anyattn.attention(q, q, q, **options)
    assert calls[0].chosen is not None
    return calls[0].chosen


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        out: torch.Tensor = anyattn.attention(x, x, x)
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Attend()
        self.second = Attend()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        return out


def ran(model: nn.Module) -> list[str | None]:
    with anyattn.record() as calls:
        model(torch.randn(1, 4, 2, 8))
    return [decision.chosen for decision in calls]


def test_built_in_default_is_native() -> None:
    assert call() == "native"


def test_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    anyattn.reset()
    assert call() == "native_math"
    monkeypatch.setenv("ANYATTN_BACKEND", "flex")
    anyattn.reset()
    assert call() == "flex"
    anyattn.set_default_backend("native_flash")
    assert call() == "native_flash"
    with anyattn.attention_backend("native_math"):
        assert call() == "native_math"
        model = Model()
        anyattn.set_attention_backend(model, "flex")
        with torch.no_grad(), pytest.warns(anyattn.AnyattnWarning, match="pin"):
            assert ran(model) == ["flex", "flex"]
        assert call(backend="native_flash") == "native_flash"


@pytest.mark.parametrize(
    ("alias", "name"), [("_native_math", "native_math"), ("Native", "native"), ("flex_attn", "flex")]
)
def test_aliases_of_diffusers_are_known(alias: str, name: str) -> None:
    assert call(backend=alias) == name


@pytest.mark.parametrize(
    "name", ["flash", "flash_varlen", "_flash_3", "sage_attn", "xformers", "_native_xla", "flash_hub"]
)
def test_planned_backend_is_unavailable_with_its_cure_never_unknown(name: str) -> None:
    with pytest.raises(anyattn.BackendUnavailableError) as caught:
        call(backend=name)
    assert caught.value.reasons


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(anyattn.UnknownBackendError, match="'flash3'"):
        call(backend="flsh3")
    with pytest.raises(anyattn.UnknownBackendError):
        anyattn.set_default_backend("nativ")
    assert call() == "native"
    with pytest.raises(TypeError):
        call(backend=3)


def test_list_prefers_and_single_name_requires() -> None:
    assert call(backend=["flash3", "native_math"]) == "native_math"
    with pytest.raises(anyattn.BackendUnavailableError):
        call(backend="flash3")
    assert call(backend=["flash3", "auto"]) == "native"


def test_typo_in_environment_fails_at_the_first_call_and_never_at_import() -> None:
    code = (
        "import os; os.environ['ANYATTN_BACKEND'] = 'Flsh'\n"
        "import torch, anyattn; print('imported')\n"
        "q = torch.randn(1, 2, 1, 4)\n"
        "try: anyattn.attention(q, q, q)\n"
        "except anyattn.UnknownBackendError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("imported")
    assert "ANYATTN_BACKEND" in result.stdout
    assert "'flash'" in result.stdout


def test_wrong_word_for_the_checks_is_an_error_and_not_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_CHECKS", "enabled")
    anyattn.reset()
    with pytest.raises(ValueError, match="DIFFUSERS_ATTN_CHECKS"):
        call()


def test_block_is_undone_by_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), anyattn.attention_backend("native_math"):
        raise RuntimeError("inside")
    assert call() == "native"


def test_blocks_nest_and_one_object_can_be_entered_twice() -> None:
    block = anyattn.attention_backend("native_math")
    with block:
        with anyattn.attention_backend("native_flash"), block:
            assert call() == "native_math"
        assert call() == "native_math"
    assert call() == "native"


def test_block_in_one_thread_is_not_seen_by_another() -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        inside.wait(10)
        seen.append(call())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with anyattn.attention_backend("native_math"):
        inside.set()
        done.wait(10)
        assert call() == "native_math"
    thread.join()
    assert seen == ["native"]


def test_native_kernels_touch_no_flag_of_the_process() -> None:
    flags: list[bool] = []
    q = torch.randn(1, 512, 8, 32)
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            flags.append(torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled())

    thread = threading.Thread(target=watch)
    thread.start()
    for backend in ("native_math", "native_flash", "native"):
        anyattn.attention(q, q, q, backend=backend)
    stop.set()
    thread.join()
    assert flags
    assert all(flags)


def test_tasks_of_one_thread_keep_their_own_block() -> None:
    async def task(name: str) -> list[str]:
        seen = []
        with anyattn.attention_backend(name):
            for _ in range(3):
                seen.append(call())
                await asyncio.sleep(0)
        return seen

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(task("native_math"), task("native_flash")))

    assert asyncio.run(both()) == [["native_math"] * 3, ["native_flash"] * 3]
    assert call() == "native"


def test_pin_is_for_one_model_alone_and_is_undone_exactly() -> None:
    one, two = Model(), Model()
    before = {name: dict(vars(module)) for name, module in one.named_modules()}
    hooks = [len(module._forward_hooks) for module in one.modules()]
    anyattn.set_attention_backend(one, "native_math")
    assert ran(one) == ["native_math"] * 2
    assert ran(two) == ["native"] * 2
    assert call() == "native"
    anyattn.reset_attention_backend(one)
    assert ran(one) == ["native"] * 2
    assert [len(module._forward_hooks) for module in one.modules()] == hooks
    assert {name: set(vars(module)) for name, module in one.named_modules()} == {k: set(v) for k, v in before.items()}


@pytest.mark.parametrize("inner_first", [True, False])
def test_most_specific_pin_wins_in_either_order(inner_first: bool) -> None:
    model = Model()
    steps = [(model.second, "native_flash"), (model, "native_math")]
    for module, name in steps if inner_first else steps[::-1]:
        anyattn.set_attention_backend(module, name)
    assert ran(model) == ["native_math", "native_flash"]
    anyattn.reset_attention_backend(model.second)
    assert ran(model) == ["native_math", "native_math"]
    anyattn.reset_attention_backend(model)
    assert ran(model) == ["native", "native"]


def test_pin_survives_deepcopy_and_holds_inside_it() -> None:
    model = Model()
    anyattn.set_attention_backend(model, "native_math")
    twin = copy.deepcopy(model)
    assert ran(twin) == ["native_math"] * 2
    anyattn.reset_attention_backend(twin)
    assert ran(twin) == ["native"] * 2
    assert ran(model) == ["native_math"] * 2


def test_pin_beats_a_block_once_said_and_override_turns_it_round() -> None:
    model = Model()
    anyattn.set_attention_backend(model, "native_math")
    with anyattn.attention_backend("native_flash"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert ran(model) == ["native_math"] * 2
            assert ran(model) == ["native_math"] * 2
        assert len([w for w in said if issubclass(w.category, anyattn.AnyattnWarning)]) <= 1
        with anyattn.record() as calls:
            model(torch.randn(1, 4, 2, 8))
        assert "native_flash" in calls[0].overruled
    with anyattn.attention_backend("native_flash", override=True):
        assert ran(model) == ["native_flash"] * 2


def test_pin_holds_where_checkpointing_runs_a_module_again() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = checkpoint(self.first, x, use_reentrant=False)
            return out

    model = Checkpointed()
    anyattn.set_attention_backend(model, "native_math")
    with anyattn.record() as calls:
        model(torch.randn(1, 4, 2, 8, requires_grad=True)).sum().backward()
    assert [decision.chosen for decision in calls] == ["native_math", "native_math"]


def test_pin_is_undone_where_forward_raises() -> None:
    model = Model()
    anyattn.set_attention_backend(model, "native_math")
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 4, 2, 5))
    assert call() == "native"
    assert ran(model) == ["native_math"] * 2


def test_reset_without_a_pin_is_an_error() -> None:
    with pytest.raises(anyattn.InvalidCallError, match="no backend"):
        anyattn.reset_attention_backend(Model())
    with pytest.raises(anyattn.InvalidCallError):
        anyattn.set_attention_backend("model", "native")  # type: ignore[arg-type]
    with pytest.raises(anyattn.UnknownBackendError):
        anyattn.set_attention_backend(model := Model(), "nativ")
    assert pins.pin_of(model) is None


def test_default_change_is_followed_by_calls_already_decided() -> None:
    assert call() == "native"
    anyattn.set_default_backend("native_math")
    assert call() == "native_math"
    anyattn.set_default_backend(None)
    assert call() == "native"


def test_records_nest_and_see_only_their_own_block() -> None:
    q = torch.randn(1, 4, 2, 8)
    with anyattn.record() as outer:
        anyattn.attention(q, q, q)
        with anyattn.record() as inner, anyattn.attention_backend("native_math"):
            anyattn.attention(q, q, q)
    anyattn.attention(q, q, q)
    assert [c.chosen for c in outer] == ["native", "native_math"]
    assert [c.chosen for c in inner] == ["native_math"]


def test_third_partys_broken_package_harms_no_other_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken_kernel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-kernel\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[anyattn.backends]\nbroken_kernel = broken_kernel:Backend\n")
    (tmp_path / "broken_kernel.py").write_text("import sys\nsys.broken_kernel = True\nraise KeyError('no symbol')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._entry_points.cache_clear()
    try:
        assert call() == "native"
        assert not hasattr(sys, "broken_kernel"), "a package that nobody asked for was imported"
        assert call(backend="auto") == "native"
        with pytest.raises(anyattn.BackendUnavailableError, match=r"broken_import.*no symbol"):
            call(backend="broken_kernel")
        row = next(row for row in anyattn.backends() if row.name == "broken_kernel")
        assert [reason.code for reason in row.reasons] == ["broken_import"]
    finally:
        registry._entry_points.cache_clear()
        registry._from_entry_point.cache_clear()
        vars(sys).pop("broken_kernel", None)
