"""The exceptions and warnings that anyattn raises.

Keywords have defaults because pickling creates an exception from its message only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from anyattn.types.decision import Decision
    from anyattn.types.reasons import Reason

__all__ = [
    "AnyattnError",
    "AnyattnWarning",
    "BackendUnavailableError",
    "InvalidCallError",
    "InvalidSettingError",
    "KernelError",
    "UnknownBackendError",
    "UnsupportedCallError",
]


class AnyattnWarning(UserWarning):
    """Something that a user should know; each is warned of once."""


GUIDE: Final = "docs/errors.md"
"""The page of the documentation that has a section for each error."""


class _Notes:
    """An error's notes, which a traceback prints below it: at first the place where the guide explains it.

    They are made when somebody looks, so that an error costs nothing more to raise, and Dynamo traces no more.
    """

    def __get__(self, error: AnyattnError | None, kind: type[AnyattnError]) -> Any:
        if error is None:
            return self
        notes = [f"See {GUIDE}#{anchor_of(kind)}"]
        error.__dict__["__notes__"] = notes
        return notes


def anchor_of(kind: type[AnyattnError]) -> str:
    """Return the anchor of an error's section in the guide, that of its nearest class which has one."""
    named = next((one for one in kind.__mro__ if one.__name__ in __all__), AnyattnError)
    return re.sub("(?<!^)(?=[A-Z])", "-", named.__name__.removesuffix("Error")).lower()


class AnyattnError(Exception):
    """The base class of anyattn's errors."""

    if not TYPE_CHECKING:
        __notes__ = _Notes()


class InvalidCallError(AnyattnError, ValueError):
    """The call is wrong for every backend."""


class UnknownBackendError(AnyattnError, ValueError):
    """No backend or alias has this name; the message lists similar names."""


class InvalidSettingError(AnyattnError, ValueError):
    """An environment variable has an invalid value."""


class BackendUnavailableError(AnyattnError, RuntimeError, ImportError):
    """A known backend can't be used here: it is not installed, too old, or broken."""

    def __init__(self, message: str, *, backend: str = "", reasons: tuple[Reason, ...] = ()) -> None:
        super().__init__(message)
        # ImportError's own field, which RuntimeError's __init__ doesn't set. Dynamo reads it; None would raise another
        # error that hides this message (torch 2.13, torch/_dynamo/symbolic_convert.py).
        self.msg = message
        self.backend = backend
        self.reasons = reasons


class UnsupportedCallError(AnyattnError, ValueError):
    """No backend that was allowed to run accepts this call; `decision` lists every reason."""

    def __init__(self, message: str, *, decision: Decision | None = None) -> None:
        super().__init__(message)
        if decision is not None:
            self.decision: Decision = decision


class KernelError(AnyattnError, RuntimeError):
    """A kernel raised an error, which this is chained to, or its result failed the value checks."""

    def __init__(self, message: str, *, backend: str = "") -> None:
        super().__init__(message)
        self.backend = backend
