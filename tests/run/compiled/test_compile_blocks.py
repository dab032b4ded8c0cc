"""Blocks around, inside and below compiled code."""

from __future__ import annotations

import contextvars
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

import anyattn
from anyattn.run import plan, traced
from anyattn.scopes import defaults, scopes

q = torch.zeros(1, 4, 2, 8)
math = anyattn.attention_backend("native_math")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert eager() == "native"
    assert not defaults.thread.entered


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What traced calls are decided to run on."""
    found: list[str | None] = []
    made = plan.make_plan

    def make(decision: Any) -> Any:
        found.append(decision.chosen)
        return made(decision)

    monkeypatch.setattr(traced, "make_plan", make)
    return found


def call() -> torch.Tensor:
    out: torch.Tensor = anyattn.attention(q, q, q)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eager() -> str:
    call()
    return str(anyattn.explain(q, q, q).chosen)


@pytest.mark.parametrize("inner", [False, True])
def test_decorated_function_compiles_as_one_graph(chosen: list[str | None], inner: bool) -> None:
    @math
    def decorated() -> torch.Tensor:
        return call()

    def around() -> torch.Tensor:
        return decorated() + call()

    torch.compile(around if inner else decorated, backend="eager", fullgraph=True)()
    assert chosen == (["native_math", "native"] if inner else ["native_math"])


def test_compiled_function_can_be_decorated(chosen: list[str | None]) -> None:
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    decorated = math(compiled)
    decorated()
    compiled()
    decorated()
    assert chosen == ["native_math", "native"]


def test_compiled_code_follows_a_generators_block_in_another_context(chosen: list[str | None]) -> None:
    compiled = torch.compile(call, backend="eager", fullgraph=True)

    def steps() -> Generator[None, None, None]:
        with math:
            while True:
                compiled()
                yield

    generator = steps()
    for _ in range(3):
        contextvars.copy_context().run(next, generator)
        compiled()
    generator.close()
    compiled()
    assert chosen == ["native_math", "native"]


def test_block_inside_compiled_code_beats_the_one_around_it(chosen: list[str | None]) -> None:
    def inside() -> torch.Tensor:
        with anyattn.attention_backend("native_flash"):
            one = call()
        return one + call()

    compiled = torch.compile(inside, backend="eager", fullgraph=True)
    with math:
        compiled()
    assert chosen == ["native_flash", "native_math"]


def test_eager_code_below_a_graph_break_has_the_block_and_may_enter_its_own() -> None:
    seen: list[str] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def below() -> None:
        seen.append(eager())
        with math:
            seen.append(eager())
        seen.append(eager())

    def inside() -> torch.Tensor:
        with anyattn.attention_backend("native_flash"):
            one = call()
            below()
            return one + call()

    torch.compile(inside, backend="eager")()
    assert seen == ["native_flash", "native_math", "native_flash"]
    assert eager() == "native"


def test_compiled_code_that_is_interrupted_leaves_nothing_in_force(chosen: list[str | None]) -> None:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def below() -> None:
        raise KeyboardInterrupt

    def inside() -> torch.Tensor:
        with math:
            one = call()
            below()
            return one

    with pytest.raises(KeyboardInterrupt):
        torch.compile(inside, backend="eager")()
    chosen.clear()
    torch.compile(call, backend="eager")()
    assert chosen == ["native"]
    assert eager() == "native"


def test_same_list_has_the_same_name_after_its_scope_was_dropped(chosen: list[str | None]) -> None:
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for _ in range(3):
        with anyattn.attention_backend(["native_math", "native"]):
            compiled()
        scopes._drop_scopes()
    assert chosen == ["native_math"]
