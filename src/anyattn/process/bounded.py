"""A dict with a bound, for caches that live as long as the process."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Bounded(dict[Key, Value], Generic[Key, Value]):
    """A dict that holds at most `most` entries: a new entry replaces the oldest.

    Reading is a plain dict's, at its speed. Writing is safe in several threads. Write only by item assignment or
    `once`: the other methods of a dict don't check the bound.
    """

    __slots__ = ("_lock", "most")

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        # Reentrant: garbage collection while an entry is dropped may write another.
        self._lock = threading.RLock()

    def __setitem__(self, key: Key, value: Value) -> None:
        with self._lock:
            if key not in self and len(self) >= self.most:
                self.pop(next(iter(self)), None)
            super().__setitem__(key, value)

    def once(self: Bounded[Key, None], key: Key) -> bool:
        """Return whether a key is new, and store it."""
        with self._lock:
            if key in self:
                return False
            self[key] = None
            return True
