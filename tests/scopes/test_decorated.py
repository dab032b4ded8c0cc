"""Functions, methods, generators and coroutines that `attention_backend` decorates."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import anyattn
from anyattn.scopes import lifetime


def chosen() -> str:
    q = torch.zeros(1, 2, 1, 4)
    found = anyattn.explain(q, q, q).chosen
    with anyattn.record() as calls:
        anyattn.attention(q, q, q)
    assert [call.chosen for call in calls] == [found]
    return str(found)


math = anyattn.attention_backend("native_math")


@math
def plain(depth: int = 0, *, end: str = "") -> list[str]:
    """Say what is chosen."""
    return [chosen(), *(plain(depth - 1) if depth else []), end]


def test_function_keeps_its_name_arguments_and_value() -> None:
    assert plain(1, end="end") == ["native_math", "native_math", "", "end"]
    assert (plain.__name__, plain.__doc__) == ("plain", "Say what is chosen.")
    assert list(inspect.signature(plain).parameters) == ["depth", "end"]
    assert chosen() == "native"


def test_function_that_raises_ends_its_block() -> None:
    @math
    def fails() -> None:
        raise LookupError(chosen())

    with pytest.raises(LookupError, match="native_math"):
        fails()
    assert chosen() == "native"


def test_methods_of_every_kind() -> None:
    class Model(nn.Module):
        @math
        def forward(self) -> str:
            return chosen()

        @math
        @classmethod
        def of_class(cls) -> tuple[str, str]:
            return cls.__name__, chosen()

        @staticmethod
        @math
        def inner_static() -> str:
            return chosen()

        @math
        @staticmethod
        def outer_static() -> str:
            return chosen()

        @property
        @math
        def value(self) -> str:
            return chosen()

    model = Model()
    assert model() == Model.inner_static() == Model.outer_static() == model.value == "native_math"
    assert model.of_class() == ("Model", "native_math")
    assert chosen() == "native"


def test_options_of_the_block_and_the_innermost_decorator_hold() -> None:
    @anyattn.attention_backend("native_flash")
    @anyattn.attention_backend(["native_math"], override=True, precision="fp8")
    def function() -> tuple[bool, str, str]:
        settings = lifetime.settings()
        return settings.override, settings.precision, chosen()

    assert function() == (True, "fp8", "native_math")


def test_threads_each_have_a_block_of_their_own() -> None:
    barrier = threading.Barrier(4)

    @math
    def work(end: int) -> list[str]:
        barrier.wait(60)
        seen = [chosen()]
        for _ in range(end):
            barrier.wait(60)
        seen.append(chosen())
        for _ in range(3 - end):
            barrier.wait(60)
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [["native_math"] * 2] * 4


@pytest.mark.parametrize("wrong", [nn.Linear(1, 1), nn.Linear, "text", None])
def test_what_cannot_be_decorated_is_refused_with_what_to_do(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Decorate the method"):
        math(wrong)


def test_callable_objects_are_of_the_kind_of_their_method() -> None:
    class Work:
        name = "work"

        async def __call__(self) -> str:
            await asyncio.sleep(0)
            return chosen()

    decorated = math(Work())
    assert inspect.iscoroutinefunction(decorated)
    assert asyncio.run(decorated()) == "native_math"
    partial = math(functools.partial(plain, end="partial"))
    assert partial() == ["native_math", "partial"]


# Generators


@math
def steps(log: list[Any]) -> Generator[str, Any, str]:
    try:
        while True:
            try:
                log.append((yield chosen()))
            except KeyError:
                log.append(chosen())
            if log[-1] == "stop":
                return chosen()
    finally:
        log.append(("closed", chosen()))


def test_generator_has_its_block_only_while_it_runs() -> None:
    assert inspect.isgeneratorfunction(steps)
    log: list[Any] = []
    generator = steps(log)
    assert next(generator) == "native_math"
    assert chosen() == "native"
    assert generator.send("sent") == "native_math"
    assert generator.throw(KeyError("thrown")) == "native_math"
    with anyattn.attention_backend("native_flash"):
        assert contextvars.copy_context().run(next, generator) == "native_math"
        assert chosen() == "native_flash"
    with pytest.raises(StopIteration) as stop:
        generator.send("stop")
    assert stop.value.value == "native_math"
    assert log == ["sent", "native_math", None, "stop", ("closed", "native_math")]
    assert chosen() == "native"


def test_generator_closed_collected_or_thrown_into_ends_clean() -> None:
    for end in ("close", "collect", "throw"):
        log: list[Any] = []
        generator = steps(log)
        next(generator)
        if end == "close":
            generator.close()
        elif end == "collect":
            del generator
        else:
            with pytest.raises(LookupError, match="thrown"):
                generator.throw(LookupError("thrown"))
        assert log == [("closed", "native_math")]
        assert chosen() == "native"
    steps([]).close()


def test_block_inside_a_decorated_generator_is_the_innermost_at_each_step() -> None:
    @math
    def outer() -> Generator[str, None, None]:
        with anyattn.attention_backend("native_flash"):
            yield chosen()
            yield chosen()
        yield chosen()
        yield from steps([])

    generator = outer()
    assert next(generator) == "native_flash"
    assert chosen() == "native_flash"  # a plain block in a generator, which is suspended
    assert [next(generator) for _ in range(3)] == ["native_flash", "native_math", "native_math"]
    assert chosen() == "native"
    generator.close()


# Coroutines and async generators


def test_coroutine_and_what_it_starts_have_the_block() -> None:
    @math
    async def work(name: str) -> list[str]:
        async def child() -> str:
            await asyncio.sleep(0)
            return chosen()

        seen = [name, chosen()]
        await asyncio.sleep(0)
        return [*seen, chosen(), *(await asyncio.gather(child(), child())), await asyncio.to_thread(chosen)]

    assert inspect.iscoroutinefunction(work)

    async def main() -> None:
        found = await asyncio.gather(work("a"), work("b"), asyncio.to_thread(chosen))
        assert list(found) == [["a"] + ["native_math"] * 5, ["b"] + ["native_math"] * 5, "native"]
        task = asyncio.create_task(work("cancelled"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert chosen() == "native"

    asyncio.run(main())


def test_coroutine_stepped_by_hand_leaves_nothing_while_it_is_suspended() -> None:
    class Pause:
        def __await__(self) -> Generator[str, str, str]:
            return (yield "paused")

    @math
    async def work() -> tuple[str, str]:
        return await Pause(), chosen()

    coroutine = work()
    assert coroutine.send(None) == "paused"
    assert chosen() == "native"
    with pytest.raises(StopIteration) as stop:
        contextvars.Context().run(coroutine.send, "sent")
    assert stop.value.value == ("sent", "native_math")


def test_async_generator_passes_everything_through() -> None:
    log: list[Any] = []

    @math
    async def stream() -> AsyncGenerator[str, str]:
        try:
            while True:
                try:
                    log.append((yield chosen()))
                    await asyncio.sleep(0)
                except KeyError:
                    log.append("thrown")
                if log[-1] == "stop":
                    return
        finally:
            await asyncio.sleep(0)
            log.append(chosen())

    assert inspect.isasyncgenfunction(stream)

    async def short() -> None:
        generator = stream()
        await generator.__anext__()
        await generator.aclose()

    asyncio.run(short())
    assert log == ["native_math"]
    log.clear()

    async def through() -> None:
        generator = stream()
        assert await generator.__anext__() == "native_math"
        assert chosen() == "native"
        assert await generator.asend("sent") == "native_math"
        assert await generator.athrow(KeyError("thrown")) == "native_math"
        with pytest.raises(StopAsyncIteration):
            await generator.asend("stop")

    asyncio.run(through())
    assert log == ["sent", "thrown", "stop", "native_math"]
