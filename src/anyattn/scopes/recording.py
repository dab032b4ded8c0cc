"""Collecting the decisions of calls."""

from __future__ import annotations

import sys
from types import TracebackType

from anyattn.scopes import defaults, lifetime
from anyattn.scopes.scopes import Owner
from anyattn.types.decision import Decision

_current = defaults.current.get


class Recording(Owner):
    """The block that `record` returns; it collects decisions."""

    def __enter__(self) -> list[Decision]:
        scope = _current()
        calls: list[Decision] = []
        lifetime.begin(self, scope, sys._getframe(1)).tell = calls.append
        return calls

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lifetime.leave(self)


def record() -> Recording:
    """Collect the decision of every call made inside the block, in this thread or task.

    Its scope is that of an `anyattn.attention_backend` block: one that a generator entered is in force at each of the
    generator's steps, and after the block nothing more is collected. Calls inside code compiled by torch.compile run
    without Python and aren't recorded.

    Returns:
        A context manager; entering it returns the list that decisions are added to.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 8, 2, 16)
        >>> with anyattn.record() as calls:
        ...     out = anyattn.attention(q, k, v)
        >>> [call.chosen for call in calls]
        ['native']
    """
    return Recording()
