"""How long a block is in force in generators, whatever context or thread runs their steps."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import warnings
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from block_helpers import chosen, each_runner, in_copy, in_thread, streaming
from torch import nn

import anyattn
from anyattn.scopes import lifetime


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    gc.collect()
    assert chosen() == "native"
    assert not lifetime.held


# Generators


@each_runner
def test_generators_block_is_in_force_at_each_of_its_steps(run: Any) -> None:
    steps = streaming("native_math")
    assert [run(next, steps) for _ in range(3)] == ["native_math"] * 3
    assert run(next, steps, "end") == "end"
    assert chosen() == "native"


@each_runner
@pytest.mark.parametrize("end", ["close", "throw", "collected"])
def test_generator_that_is_broken_off_ends_its_block(run: Any, end: str) -> None:
    steps = streaming("native_math")
    run(next, steps)
    if end == "close":
        run(steps.close)
    elif end == "throw":
        with pytest.raises(KeyError):
            run(steps.throw, KeyError("thrown"))
    else:
        held = [steps]
        del steps
        run(held.clear)
    gc.collect()
    assert chosen() == "native"


def test_context_that_entered_a_generators_block_has_it_while_it_is_suspended_and_others_have_not() -> None:
    steps = streaming("native_math")
    next(steps)
    assert chosen() == "native_math"
    assert in_copy(chosen) == "native_math"
    assert in_thread(chosen) == "native"
    in_thread(steps.close)
    assert chosen() == "native"
    steps = streaming("native_math")
    in_copy(next, steps)
    assert chosen() == "native"
    steps.close()


@contextlib.contextmanager
def managed(name: str) -> Iterator[None]:
    with anyattn.attention_backend(name):
        yield


@each_runner
def test_block_of_a_context_manager_function_is_in_force_for_its_body_until_left_anywhere(run: Any) -> None:
    with managed("native_math"):
        assert chosen() == "native_math"
    manager = managed("native_math")
    manager.__enter__()
    copy = contextvars.copy_context()
    assert copy.run(chosen) == "native_math"
    run(manager.__exit__, None, None, None)
    assert chosen() == copy.run(chosen) == "native"


class Manager:
    def __init__(self, name: str) -> None:
        self.block = anyattn.attention_backend(name)

    def __enter__(self) -> None:
        self.block.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.block.__exit__(None, None, None)


@contextlib.contextmanager
def twice_managed(name: str) -> Iterator[None]:
    with managed(name):
        yield


@each_runner
@pytest.mark.parametrize("manage", [managed, twice_managed, Manager])
@pytest.mark.parametrize("stack", [False, True])
def test_generator_has_the_block_of_a_manager_that_it_entered(run: Any, manage: Any, stack: bool) -> None:
    def steps() -> Generator[str, None, None]:
        if stack:
            with contextlib.ExitStack() as entered:
                entered.enter_context(manage("native_math"))
                yield chosen()
                yield chosen()
        else:
            with manage("native_math"):
                yield chosen()
                yield chosen()
        yield chosen()

    generator = steps()
    assert [run(next, generator) for _ in range(3)] == ["native_math", "native_math", "native"]
    assert run(next, generator, None) is None


@each_runner
def test_interleaved_generators_each_have_their_own_block(run: Any) -> None:
    one, two = streaming("native_math"), streaming("native_flash")
    for _ in range(3):
        assert (run(next, one), run(next, two)) == ("native_math", "native_flash")
    assert (run(next, one, "end"), run(next, two, "end")) == ("end", "end")
    assert chosen() == "native"


def test_generators_own_block_beats_what_its_consumer_entered_between_two_steps() -> None:
    steps = streaming("native_math")
    with anyattn.attention_backend("native_flash"):
        assert next(steps) == "native_math"
    with anyattn.attention_backend("native_flash"):
        assert next(steps) == in_copy(next, steps) == "native_math"
        assert chosen() == "native_flash"
    steps.close()


@each_runner
def test_nested_generators_have_the_innermost_block(run: Any) -> None:
    def outer() -> Generator[str, None, None]:
        with anyattn.attention_backend("native_flash"):
            yield chosen()
            yield from streaming("native_math", 2)
            yield chosen()

    steps = outer()
    wanted = ["native_flash", "native_math", "native_math", "native_flash"]
    assert [run(next, steps) for _ in wanted] == wanted
    run(next, steps, None)


@each_runner
def test_blocks_inside_a_step_are_the_innermost(run: Any) -> None:
    def steps() -> Generator[list[str], None, None]:
        with anyattn.attention_backend("native_math"):
            yield [chosen()]
            with anyattn.attention_backend("native_flash"):
                inside = chosen()
            yield [inside, chosen()]
            with anyattn.attention_backend("native_flash"):
                yield [chosen()]
                yield [chosen(), chosen(backend="native"), in_copy(chosen)]
            yield [chosen()]

    generator = steps()
    found = [run(next, generator) for _ in range(5)]
    flash = "native_flash"
    assert found == [["native_math"], [flash, "native_math"], [flash], [flash, "native", flash], ["native_math"]]
    run(next, generator, None)


@each_runner
def test_pins_beat_a_generators_block_unless_it_overrides(run: Any) -> None:
    class Attend(nn.Module):
        def forward(self) -> str:
            q = torch.zeros(1, 2, 1, 4)
            with anyattn.record() as calls:
                anyattn.attention(q, q, q)
            return str(calls[0].chosen)

    model = Attend()
    anyattn.set_attention_backend(model, "native_flash")

    def steps(override: bool) -> Generator[str, None, None]:
        with anyattn.attention_backend("native_math", override=override):
            yield model()
            yield model()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", anyattn.AnyattnWarning)  # said once a process, that the pin decides
        generator = steps(False)
        assert [run(next, generator) for _ in range(2)] == ["native_flash"] * 2
        run(generator.close)
    generator = steps(True)
    assert [run(next, generator) for _ in range(2)] == ["native_math"] * 2
    run(generator.close)


def test_precision_of_a_generators_block_goes_along() -> None:
    def steps() -> Generator[str, None, None]:
        with anyattn.attention_backend(["native_math"], precision="fp8"):
            while True:
                yield lifetime.settings().precision

    generator = steps()
    assert [in_copy(next, generator) for _ in range(2)] == ["fp8", "fp8"]
    generator.close()
