"""Count a pipeline's denoising steps, by what it calls on its schedulers.

While a pipeline that is followed runs, `set_timesteps` and `step` of its schedulers' classes are wrapped. Not of the
objects: several pipelines copy their scheduler in the middle of a run (LTX 2, SkyReels), or compare its class (Bria).
In other threads and tasks the wrappers only pass calls on.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from anyattn.errors import AnyattnWarning
from anyattn.pins import steps
from anyattn.pins.steps import Clock

FOLLOWED: Final = "_anyattn_followed"
"""The attribute of a pipeline whose steps are counted."""

_METHODS: Final = ("set_timesteps", "step")

_lock = threading.RLock()
_live: weakref.WeakSet[Followed] = weakref.WeakSet()
_pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
_wrapped: dict[tuple[type, str], tuple[int, Any, Any]] = {}


class Run(Clock):
    """The steps of one call of a pipeline, counted by the scheduler that was last given its timesteps."""

    __slots__ = ("_made", "_order", "_scheduler", "_total", "inner")

    def __init__(self) -> None:
        super().__init__()
        self._scheduler: Any = None
        self._made = self._total = 0
        self._order = 1
        self.inner = False  # whether a wrapped method runs, which may call another one

    def began(self, scheduler: Any) -> None:
        """Note that a scheduler was given its timesteps."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return
        self._scheduler, self._made, self._latest = scheduler, 0, None
        self._order = max(int(getattr(scheduler, "order", 1)), 1)

    def stepped(self, scheduler: Any, timestep: Any) -> None:
        """Note that a scheduler made a step."""
        if scheduler is not self._scheduler:
            return
        if self._made == 0:
            self._total = len(scheduler.timesteps) - _begin_after(scheduler, timestep)
        self._made += 1
        self._latest = self._at(self._made, self._total)

    def now(self) -> tuple[int, int] | None:
        """Return the step and the number of steps; a method of order 2 calls its scheduler twice a step."""
        if self._made or self._scheduler is None:
            return self._latest
        # Before the first step: a run that starts in the middle mostly says so, but after it set its timesteps.
        begin = getattr(self._scheduler, "begin_index", None) or 0
        return self._at(0, len(self._scheduler.timesteps) - begin)

    def _at(self, made: int, total: int) -> tuple[int, int] | None:
        return (made // self._order, math.ceil(total / self._order)) if made < total else None

    @property
    def stands(self) -> bool:
        """Whether timesteps were set, and no step was made of several."""
        return self._scheduler is not None and self._made == 0 and len(self._scheduler.timesteps) > 1


def _begin_after(scheduler: Any, timestep: Any) -> int:
    """Return the place in its timesteps at which a scheduler that made one step has begun."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    index = getattr(scheduler, "step_index", None)
    if index is not None:
        return int(index) - 1
    # DDIM, DDPM and others keep no count. This waits for the device, once a run.
    if isinstance(timestep, torch.Tensor) and timestep.numel():
        timestep = timestep.flatten()[0].item()
    if not isinstance(timestep, int | float):
        return 0
    places = [place for place, one in enumerate(scheduler.timesteps.tolist()) if one == timestep]
    return places[0] if places else 0


class Followed:
    """What a pipeline holds whose steps are counted; copies of the pipeline have their own."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        _wrap(kind, "__call__", _running)
        self.end = weakref.finalize(self, _unwrap, kind, "__call__")
        self.end.atexit = False
        _live.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        return Followed(self.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        return Followed, (self.kind,)


def schedulers(pipeline: Any) -> list[Any]:
    """Return the components of a pipeline that are schedulers."""
    return [part for part in pipeline.components.values() if all(hasattr(part, name) for name in _METHODS)]


def follow(pipeline: Any) -> None:
    """Count the steps of a pipeline's calls."""
    if FOLLOWED not in pipeline.__dict__:
        pipeline.__dict__[FOLLOWED] = Followed(type(pipeline))
        _pipelines.add(pipeline)


def leave(pipeline: Any) -> None:
    """Don't count them any more."""
    pipeline.__dict__.pop(FOLLOWED, None)
    _pipelines.discard(pipeline)


def leave_all() -> None:
    """Don't count the steps of any pipeline any more, copies included."""
    for pipeline in list(_pipelines):
        leave(pipeline)
    for followed in list(_live):
        followed.end()


def _wrap(kind: type, name: str, make: Callable[[Any], Any]) -> None:
    """Wrap a method of a class until `_unwrap` was called as often."""
    with _lock:
        if (kind, name) in _wrapped:
            count, wrapper, before = _wrapped[kind, name]
        else:
            count, wrapper, before = 0, make(getattr(kind, name)), vars(kind).get(name)
            setattr(kind, name, wrapper)
        _wrapped[kind, name] = (count + 1, wrapper, before)


def _unwrap(kind: type, name: str) -> None:
    with _lock:
        count, wrapper, before = _wrapped.pop((kind, name))
        if count > 1:
            _wrapped[kind, name] = (count - 1, wrapper, before)
        elif vars(kind).get(name) is wrapper:  # else another library has put one of its own on top
            if before is None:  # the class inherits it
                delattr(kind, name)
            else:
                setattr(kind, name, before)


def _running(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if FOLLOWED not in self.__dict__:
            return stock(self, *args, **kwargs)
        with _counted(self) as run:
            out = stock(self, *args, **kwargs)
        if run.stands and not getattr(self, "_interrupt", False):
            warnings.warn(
                f"{type(self).__name__} set its timesteps and never called its scheduler's step, so the rules of its "
                "policy that name steps saw no step but the first.",
                AnyattnWarning,
                stacklevel=2,
            )
        return out

    return __call__


@contextmanager
def _counted(pipeline: Any) -> Iterator[Run]:
    kinds = list(dict.fromkeys(type(scheduler) for scheduler in schedulers(pipeline)))
    run = Run()
    done: list[tuple[type, str]] = []
    before = steps.current.get()
    try:
        for kind in kinds:
            for name, make in zip(_METHODS, (_beginning, _stepping), strict=True):
                _wrap(kind, name, make)
                done.append((kind, name))
        steps.current.set(run)
        yield run
    finally:
        steps.current.set(before)
        for kind, name in done:
            _unwrap(kind, name)


def _beginning(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, run = _passed_on(stock, self, args, kwargs)
        if run is not None:
            run.began(self)
        return out

    return set_timesteps


def _stepping(stock: Callable[..., Any]) -> Callable[..., Any]:
    # CogVideoX's schedulers have other arguments before it.
    names = list(inspect.signature(stock).parameters)
    place = names.index("timestep") - 1 if "timestep" in names else -1

    @functools.wraps(stock)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, run = _passed_on(stock, self, args, kwargs)
        if run is not None:
            run.stepped(self, args[place] if 0 <= place < len(args) else kwargs.get("timestep"))
        return out

    return step


def _passed_on(stock: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> tuple[Any, Run | None]:
    """Call a scheduler's method, and return the run that counts it, if one does."""
    if torch.compiler.is_dynamo_compiling():
        return stock(scheduler, *args, **kwargs), None
    run = steps.current.get()
    if not isinstance(run, Run) or run.inner:
        return stock(scheduler, *args, **kwargs), None
    run.inner = True
    try:
        return stock(scheduler, *args, **kwargs), run
    finally:
        run.inner = False
