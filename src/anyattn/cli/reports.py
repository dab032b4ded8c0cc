"""The report that every command returns, and its progress: values only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from anyattn.errors import AnyattnError


class UsageError(AnyattnError, ValueError):
    """Wrong usage of a command; the message says what was given, and what to write instead."""


class Report(Protocol):
    """The answer of a command."""

    @property
    def exit_code(self) -> int:
        """What the process ends with: 0 is yes, 1 is no."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""


class Step(NamedTuple):
    """How far a command is.

    Attributes:
        text: What is being done.
        done: How many steps are finished.
        total: How many there are; 0 if that isn't known.
    """

    text: str
    done: int
    total: int


Progress = Callable[[Step], None]
"""Called with each step."""
