"""What the tests of blocks share: asking what is in force, and running a step elsewhere."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

import anyattn
from anyattn.pins.pins import live_scope
from anyattn.scopes import defaults, lifetime

Result = TypeVar("Result")


def chosen(**options: Any) -> str:
    """Say which backend a call made here runs on; by the hot path and by asking, which must agree."""
    q = torch.zeros(1, 2, 1, 4)
    asked = anyattn.explain(q, q, q, **options).chosen
    with anyattn.record() as calls:
        anyattn.attention(q, q, q, **options)
    assert [call.chosen for call in calls] == [asked]
    assert ran() == asked or options
    assert asked is not None
    return asked


def ran() -> str:
    """Say which backend a call made here runs on, without entering anything."""
    q = torch.zeros(1, 2, 1, 4)
    anyattn.attention(q, q, q)
    scope = defaults.current.get()
    if scope.look or defaults.thread.entered or lifetime.held:  # what the hot path looks at
        scope = live_scope(scope)
    return scope.preference().names[0]


def in_copy(function: Callable[..., Result], *arguments: Any) -> Result:
    return contextvars.copy_context().run(function, *arguments)


def in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(60)


def in_bare(function: Callable[..., Result], *arguments: Any) -> Result:
    return contextvars.Context().run(function, *arguments)


RUNNERS = [in_copy, in_thread, in_bare, lambda function, *arguments: function(*arguments)]
RUNNER_NAMES = ["copied context", "thread", "empty context", "here"]
each_runner = pytest.mark.parametrize("run", RUNNERS, ids=RUNNER_NAMES)


def streaming(name: str, steps: int = 3) -> Generator[str, None, None]:
    with anyattn.attention_backend(name):
        for _ in range(steps):
            yield chosen()
