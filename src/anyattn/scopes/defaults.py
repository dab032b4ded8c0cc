"""The settings of the process: its default backend, environment variables, and the value checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from anyattn.errors import InvalidSettingError
from anyattn.scopes import scopes
from anyattn.scopes.scopes import Entered, Scope, changed, current, derive, inside, leave, scope_for, thread
from anyattn.scopes.tokens import ROUTE, plain, scope_of_token, with_entered
from anyattn.scopes.values import Settings
from anyattn.types.decision import Mode, Precision, Preference

__all__ = (
    "ROUTE",
    "Entered",
    "Scope",
    "Settings",
    "changed",
    "current",
    "derive",
    "inside",
    "leave",
    "plain",
    "scope_for",
    "scope_of_token",
    "thread",
    "with_entered",
)

ENV_BACKEND: Final = "ANYATTN_BACKEND"
ENV_BACKEND_DIFFUSERS: Final = "DIFFUSERS_ATTN_BACKEND"
ENV_CHECKS: Final = "ANYATTN_CHECKS"
ENV_CHECKS_DIFFUSERS: Final = "DIFFUSERS_ATTN_CHECKS"

_TRUE = frozenset(("1", "yes", "true", "on"))
_FALSE = frozenset(("", "0", "no", "false", "off"))

_lock = scopes.lock
_default: Preference | None = None
_environment: Preference | None = None
_checks: bool | None = None


def preference(names: tuple[str, ...], *, is_list: bool, source: str, precision: Precision = "exact") -> Preference:
    """Make a preference: one explicit name is required, a list or `auto` is a preference."""
    mode: Mode = "prefer" if is_list or names == ("auto",) else "require"
    return Preference(names, mode, source, precision)


def process_default() -> Preference:
    """Return the preference that applies without a block or pin."""
    global _environment
    if _default is not None:
        return _default
    if _environment is None:
        _environment = from_environment(os.environ)
    return _environment


scopes.process_default = process_default


def from_environment(environ: Mapping[str, str]) -> Preference:
    """Read the environment variables; names are checked when a call uses them, so import never fails."""
    for variable in (ENV_BACKEND, ENV_BACKEND_DIFFUSERS):
        names = tuple(part.strip() for part in environ.get(variable, "").split(",") if part.strip())
        if names and names != ("anyattn",):
            return preference(names, is_list=len(names) > 1, source=variable)
    return Preference(("native",), "require", "built-in")


def set_default(wish: Preference | None) -> None:
    """Set or clear the process default; calls already decided are forgotten."""
    global _default
    _default = wish
    forget()


def forget() -> None:
    """Forget every decided call, and what was read from the environment."""
    global _environment, _checks
    with _lock:
        _environment = None
        _checks = None
        scopes.forget_decisions()


def means_yes(word: str) -> bool | None:
    """Read a word as yes or no, in any case; None if it is neither."""
    word = word.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def checks_enabled() -> bool:
    """Whether the value checks are on; read once, and again after `forget`.

    Raises:
        InvalidSettingError: If a variable holds neither a yes nor a no.
    """
    global _checks
    if _checks is None:
        found = False
        for variable in (ENV_CHECKS, ENV_CHECKS_DIFFUSERS):
            word = os.environ.get(variable, "")
            wanted = means_yes(word)
            if wanted is None:
                raise InvalidSettingError(
                    f"{variable} is {word!r}; set it to 1, yes, true or on for the value checks, or to 0 for none."
                )
            found = found or wanted
        _checks = found
    return _checks


_overrides: dict[str, str] = {}


def follow(overrides: Mapping[str, str]) -> bool:
    """Forget every decided call if torch's kernels were replaced or restored since the last call of this.

    Returns:
        Whether they were.
    """
    global _overrides
    if _overrides == overrides:
        return False
    _overrides = dict(overrides)
    forget()
    return True


def generation() -> int:
    """Return a number that `forget` changes; a call decided under another number must not be stored."""
    return scopes.generation
