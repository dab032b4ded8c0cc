"""A dict with a bound, for everything that is remembered for the life of a process."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Bounded(dict[Key, Value], Generic[Key, Value]):
    """A dict that holds at most so many entries: a new one takes the place of the oldest.

    Reading is a plain dict's, at its speed. Writing is safe in several threads; use item assignment or `once`, since
    the dict's other ways of writing don't look at the bound.
    """

    __slots__ = ("_lock", "most")

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        # Reentrant: collecting garbage while an entry is dropped may write another.
        self._lock = threading.RLock()

    def __setitem__(self, key: Key, value: Value) -> None:
        with self._lock:
            if key not in self and len(self) >= self.most:
                self.pop(next(iter(self)), None)
            super().__setitem__(key, value)

    def once(self: Bounded[Key, None], key: Key) -> bool:
        """Return whether a key is new, and remember it."""
        with self._lock:
            if key in self:
                return False
            self[key] = None
            return True
