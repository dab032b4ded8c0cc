"""Collecting the decisions of calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from anyattn.records.calls import Calls
from anyattn.scopes import defaults, lifetime
from anyattn.scopes.scopes import Life, Owner

_current = defaults.current.get


class Recording(Owner):
    """The block that `record` returns; it collects decisions."""

    def __init__(self, path: str | Path | None = None, *, times: bool = False) -> None:
        super().__init__()
        self.path = path
        self.times = times
        self._calls: dict[Life, Calls] = {}

    def __enter__(self) -> Calls:
        calls = Calls()
        life = lifetime.begin(self, _current(), sys._getframe(1))
        life.timed = self.times
        life.tell = calls.note
        self._calls[life] = calls
        return calls

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        life = lifetime.leave(self)
        calls = None if life is None else self._calls.pop(life)
        if calls is not None and self.path is not None:
            calls.save(self.path)


def record(path: str | Path | None = None, *, times: bool = False) -> Recording:
    """Collect the decision of every call made inside the block, in this thread or task, with the layer that made it.

    Its scope is that of an `anyattn.attention_backend` block: one that a generator entered is in force at each of the
    generator's steps, and after the block nothing more is collected. Calls inside code compiled by torch.compile run
    without Python and aren't recorded.

    Args:
        path: A file that gets the rows as JSON when the block is left; see `Calls.save`.
        times: Whether each call is timed: by events on a GPU, which wait for nothing until the times are read, and by
            the clock elsewhere.

    Returns:
        A context manager; entering it returns the list that decisions are added to. Printed, the list is a table of
        layers and backends; `rows()` gives that as objects, `plot(path)` as a picture.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 8, 2, 16)
        >>> with anyattn.record() as calls:
        ...     out = anyattn.attention(q, k, v)
        >>> [call.chosen for call in calls]
        ['native']
        >>> calls.layers
        ['(no module)']
    """
    return Recording(path, times=times)
