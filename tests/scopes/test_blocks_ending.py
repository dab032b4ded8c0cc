"""Blocks and records that end in any order and anywhere, in tasks and threads; and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from block_helpers import RUNNERS, chosen, each_runner, in_bare, in_copy, in_thread, ran, streaming

import anyattn
from anyattn.scopes import defaults, lifetime, scopes


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    assert chosen() == "native"
    assert not lifetime.held


# Order of ending, and one object used more than once


def test_blocks_may_end_in_any_order() -> None:
    names = ["native_math", "native_flash", "flex"]
    for order in itertools.permutations(range(3)):
        blocks = [anyattn.attention_backend(name).__enter__() for name in names]
        left: set[int] = set()
        for index in order:
            blocks[index].__exit__(None, None, None)
            left.add(index)
            live = [name for at, name in enumerate(names) if at not in left]
            assert ran() == (live[-1] if live else "native")


def test_leaving_too_often_does_nothing() -> None:
    block = anyattn.attention_backend("native_math")
    block.__exit__(None, None, None)
    with anyattn.attention_backend("native_flash"):
        with block:
            assert chosen() == "native_math"
        block.__exit__(None, None, None)
        assert chosen() == "native_flash"
        in_thread(block.__exit__, None, None, None)
        in_copy(block.__exit__, None, None, None)
        assert chosen() == "native_flash"


def test_leaving_too_often_in_one_thread_leaves_another_inside() -> None:
    block = anyattn.attention_backend("native_math")
    inside, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def work() -> None:
        with block:
            inside.set()
            go_on.wait(60)
            seen.append(ran())

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    with block:
        pass
    block.__exit__(None, None, None)
    go_on.set()
    thread.join()
    assert seen == ["native_math"]


def test_object_entered_again_ends_innermost_first() -> None:
    block, other = anyattn.attention_backend("native_math"), anyattn.attention_backend("native_flash")
    with block, other, block:
        with other:
            assert chosen() == "native_flash"
        assert chosen() == "native_math"


@each_runner
def test_one_object_serves_interleaved_generators_and_their_consumer(run: Any) -> None:
    block = anyattn.attention_backend("native_math")

    def steps() -> Generator[str, None, None]:
        with block:
            yield chosen()
            yield chosen()
        yield chosen()

    one, two = steps(), steps()
    assert [run(next, one), run(next, two)] == ["native_math"] * 2
    with anyattn.attention_backend("native_flash"), block:
        run(next, one)
        run(next, one)
        assert chosen() == "native_math", "the generator ended its own"
    assert run(next, two) == "native_math"
    run(next, two)
    assert chosen() == "native"


def test_block_may_be_left_in_another_thread_or_context_than_it_was_entered_in() -> None:
    for run in (in_thread, in_copy, in_bare):
        block = anyattn.attention_backend("native_math").__enter__()
        assert chosen() == "native_math"
        run(block.__exit__, None, None, None)
        assert ran() == chosen() == "native"
        block = run(anyattn.attention_backend("native_math").__enter__)
        block.__exit__(None, None, None)
        assert chosen() == "native"


def test_leaving_an_outer_block_elsewhere_keeps_the_inner_and_forgets_what_stands_on_it() -> None:
    outer = anyattn.attention_backend("native_math").__enter__()
    with anyattn.attention_backend("native_flash"):
        in_thread(outer.__exit__, None, None, None)
        assert chosen() == "native_flash"
    assert chosen() == "native"
    outer.__enter__()
    with anyattn.record() as calls:
        in_copy(outer.__exit__, None, None, None)
        assert ran() == "native"
    assert [call.chosen for call in calls] == ["native"]


def test_exception_goes_through_and_the_block_ends() -> None:
    def steps() -> Generator[None, None, None]:
        with anyattn.attention_backend("native_math"):
            yield
            raise LookupError("inside")

    generator = steps()
    in_copy(next, generator)
    with pytest.raises(LookupError, match="inside"):
        in_copy(next, generator)
    assert chosen() == "native"


def test_generator_collected_in_another_thread_ends_its_block_there() -> None:
    steps = streaming("native_math")
    next(steps)
    gone = weakref.ref(steps)
    box = [steps]
    del steps
    in_thread(box.clear)
    assert gone() is None
    assert chosen() == "native"


# asyncio


def test_task_made_inside_a_block_has_it_until_the_block_is_left() -> None:
    async def main() -> list[str]:
        go_on = asyncio.Event()
        seen: list[str] = []

        async def task() -> None:
            seen.append(chosen())
            await go_on.wait()
            seen.append(chosen())

        with anyattn.attention_backend("native_math"):
            running = asyncio.create_task(task())
            await asyncio.sleep(0)
            seen.append(await asyncio.to_thread(chosen))
            seen.append(await asyncio.get_running_loop().run_in_executor(None, chosen))
        go_on.set()
        await running
        return [*seen, chosen()]

    assert asyncio.run(main()) == ["native_math", "native_math", "native", "native", "native"]


def test_async_generator_driven_by_several_tasks_has_its_block_at_each_step() -> None:
    async def stream() -> AsyncGenerator[str, None]:
        with anyattn.attention_backend("native_math"):
            yield chosen()
            await asyncio.sleep(0)
            yield chosen()
        yield chosen()

    @contextlib.asynccontextmanager
    async def manage() -> AsyncIterator[None]:
        with anyattn.attention_backend("native_flash"):
            yield

    async def managed_stream() -> AsyncGenerator[str, None]:
        async with manage():
            yield chosen()
            yield chosen()

    async def one_step(steps: AsyncGenerator[str, None]) -> str:
        return await steps.__anext__()

    async def main() -> None:
        for function, wanted in (
            (stream, ["native_math", "native_math", "native"]),
            (managed_stream, ["native_flash"] * 2),
        ):
            steps = function()
            found = [await asyncio.create_task(one_step(steps)) for _ in wanted]
            assert found == wanted
            assert chosen() == "native"
            await steps.aclose()
            assert chosen() == "native"

    asyncio.run(main())


def test_coroutine_stepped_in_other_contexts_keeps_its_block() -> None:
    class Pause:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def work() -> list[str]:
        seen = []
        with anyattn.attention_backend("native_math"):
            for _ in range(3):
                seen.append(chosen())
                await Pause()
        return seen

    runners: list[Any] = RUNNERS
    for run in runners:
        coroutine = work()
        for _ in range(3):
            run(coroutine.send, None)
        with pytest.raises(StopIteration) as stop:
            run(coroutine.send, None)
        assert stop.value.value == ["native_math"] * 3


def test_generators_in_many_threads_at_once_keep_their_own() -> None:
    names = ["native_math", "native_flash", "native"] * 4
    generators = [streaming(name, 8) for name in names]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(8):
            assert list(pool.map(next, generators)) == names
        assert list(pool.map(lambda steps: next(steps, "end"), generators)) == ["end"] * len(names)


# Records


@each_runner
def test_generators_record_has_the_calls_of_each_step_once(run: Any) -> None:
    q = torch.zeros(1, 2, 1, 4)
    seen: list[Any] = []

    def steps() -> Generator[None, None, None]:
        with anyattn.record() as calls, anyattn.attention_backend("native_math"):
            seen.append(calls)
            for _ in range(3):
                anyattn.attention(q, q, q)
                yield
            with anyattn.attention_backend("native_flash"):
                anyattn.attention(q, q, q)

    generator = steps()
    for _ in range(3):
        run(next, generator)
    run(next, generator, None)
    anyattn.attention(q, q, q)
    assert [call.chosen for call in seen[0]] == ["native_math"] * 3 + ["native_flash"]


def test_records_may_end_in_any_order_and_collect_nothing_more() -> None:
    q = torch.zeros(1, 2, 1, 4)
    one, two = anyattn.record(), anyattn.record()
    first, second = one.__enter__(), two.__enter__()
    copy = contextvars.copy_context()
    with anyattn.attention_backend("native_math"):
        anyattn.attention(q, q, q)
        in_thread(one.__exit__, None, None, None)
        anyattn.attention(q, q, q)
    two.__exit__(None, None, None)
    two.__exit__(None, None, None)
    anyattn.attention(q, q, q)
    copy.run(anyattn.attention, q, q, q)
    assert (len(first), len(second)) == (1, 2)
    assert defaults.current.get().recorder is None


# Cost


def test_no_call_looks_for_frames_unless_a_generator_holds_a_block() -> None:
    with anyattn.attention_backend("native_math"):
        assert not lifetime.held
        assert not defaults.current.get().look
        steps = streaming("native_flash")
        next(steps)
        assert len(lifetime.held) == 1
        steps.close()
        assert not lifetime.held
    assert defaults.current.get() is scopes.scope_for(defaults.Settings())


def test_ended_blocks_leave_nothing_to_collect() -> None:
    gc.collect()
    gc.disable()
    try:
        made = []
        for _ in range(3):
            with anyattn.attention_backend("native_math"), anyattn.record(), anyattn.attention_backend("native_flash"):
                made.append(weakref.ref(defaults.current.get()))
            list(streaming("native_math"))
        assert [scope() for scope in made] == [None] * 3
    finally:
        gc.enable()


def test_scopes_are_bounded_however_many_lists_are_asked_for() -> None:
    q = torch.zeros(1, 2, 1, 4)
    gc.unfreeze()  # what other files left is frozen, see conftest.py, and wouldn't be collected when it is dropped
    kept = anyattn.attention_backend(["native_math", "native"]).__enter__()
    names = ("native", "native_math", "native_flash", "flex", "native_efficient", "native_cudnn")
    lists = [list(order) for size in (4, 5, 6) for order in itertools.permutations(names, size)][:900]
    for order in lists:
        with anyattn.attention_backend(order):
            anyattn.explain(q, q, q)
        anyattn.explain(q, q, q, backend=order)
    gc.collect()
    assert len(scopes._alive) <= scopes._MOST_SCOPES + 8
    assert ran() == "native_math"
    anyattn.set_default_backend("flex")
    kept.__exit__(None, None, None)
    assert ran() == "flex"
    anyattn.set_default_backend(None)


def test_scope_dropped_while_in_force_forgets_its_decisions_with_the_others() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with anyattn.attention_backend(["native_math", "native"]):
        anyattn.attention(q, q, q)
        scope = defaults.current.get()
        assert scope.table
        scopes._drop_scopes()
        anyattn.reset()
        assert not scope.table
        assert not scope.short
