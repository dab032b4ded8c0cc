"""Functions, generators and coroutines with a block of their own at each call."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from anyattn.scopes import _in_force, defaults, lifetime
from anyattn.scopes.scopes import Owner
from anyattn.types.decision import Preference

_tracing = torch.compiler.is_dynamo_compiling

Function = TypeVar("Function", bound=Callable[..., Any])
Block = Callable[[], Any]


class Steps(Owner):
    """One call of a generator or coroutine; its block is in force only while a step of it runs."""

    def __init__(self, wish: Preference, override: bool) -> None:
        self.wish: Preference = wish
        self.override = override
        self.life = None if _tracing() else lifetime.stepping(self)

    def run(self, resume: Callable[..., Any], arguments: Sequence[Any] = ()) -> Any:
        """Run one step."""
        if self.life is not None:
            return lifetime.step(self.life, resume, arguments)
        _in_force.entered.append(defaults.plain("context", self.wish, self.override))
        try:
            return resume(*arguments)
        finally:
            _in_force.entered.pop()

    def end(self) -> None:
        """End the block, also in tasks and contexts that were made inside it."""
        if self.life is not None:
            lifetime.end(self.life)


def decorated(function: Function, block: Block, steps: Callable[[], Steps]) -> Function:
    """Wrap a function so that each call has a new block; the result is of the same kind (generator, coroutine, ...).

    Args:
        function: A function or method of any kind, or another callable that is no class and no module.
        block: Returns a new block.
        steps: Returns a new block for one call of a generator or coroutine.

    Raises:
        TypeError: If it can't be decorated.
    """
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(decorated(function.__func__, block, steps))
    if isinstance(function, (type, torch.nn.Module)) or not callable(function):
        kind = f"the class {function.__name__}" if isinstance(function, type) else f"a {type(function).__name__}"
        raise TypeError(
            f"attention_backend decorates functions and methods; {kind} was given. Decorate the method that computes "
            "attention, or pin a module with anyattn.set_attention_backend(module, backend)."
        )
    run = _wrapper(function, block, steps)
    # A function's attributes are copied; another object's belong to it.
    updated = functools.WRAPPER_UPDATES if isinstance(function, types.FunctionType) else ()
    return functools.wraps(function, updated=updated)(run)  # type: ignore[return-value]


def _wrapper(function: Callable[..., Any], block: Block, steps: Callable[[], Steps]) -> Callable[..., Any]:
    # An object's kind is that of its `__call__`; inspect looks through functools.partial.
    kind: Any = function
    if not (inspect.isroutine(function) or isinstance(function, functools.partial)):
        kind = type(function).__call__
    if inspect.isasyncgenfunction(kind):
        return _async_generator(function, steps)
    if inspect.iscoroutinefunction(kind) or inspect.iscoroutinefunction(function):

        async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
            own = steps()
            try:
                return await _awaited(function(*args, **kwargs), own)
            finally:
                own.end()

        return run_coroutine
    if inspect.isgeneratorfunction(kind):

        def run_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            own = steps()
            try:
                return (yield from _driven(function(*args, **kwargs), own))
            finally:
                own.end()

        return run_generator

    def run(*args: Any, **kwargs: Any) -> Any:
        with block():
            return function(*args, **kwargs)

    return run


def _async_generator(function: Callable[..., Any], steps: Callable[[], Steps]) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        own = steps()
        generator = function(*args, **kwargs)
        try:
            answer = await _awaited(generator.asend(None), own)
            while True:
                try:
                    request = yield answer
                except GeneratorExit:
                    await _awaited(generator.aclose(), own)
                    raise
                except BaseException as error:  # noqa: BLE001 - handed to the function
                    answer = await _awaited(generator.athrow(error), own)
                else:
                    answer = await _awaited(generator.asend(request), own)
        except StopAsyncIteration:
            return
        finally:
            own.end()

    return run


def _driven(generator: Any, own: Steps) -> Generator[Any, Any, Any]:
    """Run a generator, or what `await` iterates over, step by step."""
    try:
        answer = own.run(generator.send, (None,))
        while True:
            try:
                request = yield answer
            except GeneratorExit:
                own.run(generator.close)
                raise
            except BaseException as error:  # noqa: BLE001 - handed to the function
                answer = own.run(generator.throw, (error,))
            else:
                answer = own.run(generator.send, (request,))
    except StopIteration as stop:
        return stop.value


@types.coroutine
def _awaited(awaitable: Any, own: Steps) -> Generator[Any, Any, Any]:
    return (yield from _driven(awaitable.__await__(), own))
