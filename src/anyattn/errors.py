"""The exceptions and warnings that anyattn raises.

Their keywords have defaults so that pickling, which makes an exception anew from its message, can restore them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    """Something that a person should know, said once."""


class AnyattnError(Exception):
    """The base of every error that anyattn raises on purpose."""


class InvalidCallError(AnyattnError, ValueError):
    """The call is wrong whatever the backend: it says what was needed, what was given and what to do."""


class UnknownBackendError(AnyattnError, ValueError):
    """No backend or alias has this name; the message gives the nearest names that exist."""


class InvalidSettingError(AnyattnError, ValueError):
    """An environment variable holds something that can't be followed."""


class BackendUnavailableError(AnyattnError, RuntimeError, ImportError):
    """A backend that is known but can't be used here: not installed, too old, or broken."""

    def __init__(self, message: str, *, backend: str = "", reasons: tuple[Reason, ...] = ()) -> None:
        super().__init__(message)
        # ImportError's own field, which isn't set where RuntimeError comes first; Dynamo looks into it (torch 2.13,
        # torch/_dynamo/symbolic_convert.py), and fails on None instead of giving this message.
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
    """A kernel raised, or gave an answer that the checks refuse; chained to the kernel's own error."""

    def __init__(self, message: str, *, backend: str = "") -> None:
        super().__init__(message)
        self.backend = backend
