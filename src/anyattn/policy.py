"""What a person asked for: scopes, pins, process default and environment variables. All state is here.

The state of a thread or task is one `Scope`, held by a context variable. A scope knows its settings and keeps the
table of calls already decided under them, so that the hot path is one look-up. Scopes of equal settings are one
object. torch.compile can't read a context variable; it reads `anyattn._in_force.token`, which it guards on.
"""

from __future__ import annotations

import contextvars
import itertools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from anyattn.decision import Mode, Precision, Preference
from anyattn.errors import InvalidSettingError

ENV_BACKEND: Final = "ANYATTN_BACKEND"
ENV_BACKEND_DIFFUSERS: Final = "DIFFUSERS_ATTN_BACKEND"
ENV_CHECKS: Final = "ANYATTN_CHECKS"
ENV_CHECKS_DIFFUSERS: Final = "DIFFUSERS_ATTN_CHECKS"

_TRUE = frozenset(("1", "yes", "true", "on"))
_FALSE = frozenset(("", "0", "no", "false", "off"))
_MAX_SCOPES = 256
_MAX_TABLE = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What has been asked for in one scope.

    Attributes:
        context: The wish of the innermost `attention_backend` block.
        override: Whether that wish beats pins.
        pin: The wish pinned to the module whose forward is running.
        precision: The loosest precision allowed, where a block or pin says so.
    """

    context: Preference | None = None
    override: bool = False
    pin: Preference | None = None
    precision: Precision = "exact"


class Scope:
    """Settings in force, with the table of calls decided under them."""

    __slots__ = ("entered", "pinned", "recorder", "serial", "settings", "short", "table")

    def __init__(self, settings: Settings, serial: int, recorder: Recorder | None = None) -> None:
        self.settings = settings
        self.serial = serial
        self.pinned = settings.pin is not None
        self.recorder = recorder
        # Decided calls; those without mask that need no further look are in `short`, under a shorter key.
        self.table: dict[Any, Any] = {}
        self.short: dict[Any, Any] = {}
        self.entered: dict[tuple[int, bool], tuple[Preference, Scope]] = {}

    def preference(self) -> Preference:
        """Give the wish in force: pin, then block, then process default, then environment, then native."""
        settings = self.settings
        if settings.pin is not None and not (settings.override and settings.context is not None):
            return settings.pin
        if settings.context is not None:
            return settings.context
        default = process_default()
        if settings.precision != "exact":
            default = replace(default, precision=settings.precision)
        return default

    def overruled(self) -> str:
        """Say which wish a more specific one overruled, or give the empty string."""
        settings = self.settings
        if settings.pin is None or settings.context is None or settings.pin.names == settings.context.names:
            return ""
        if settings.override:
            return f"the pin to {settings.pin} by attention_backend({settings.context}, override=True)"
        return f"attention_backend({settings.context}) by the model's pin to {settings.pin}"

    def remember(self, key: Any, runner: Any) -> None:
        """Put a decided call into the table, which is bounded."""
        if len(self.table) >= _MAX_TABLE:
            self.table.clear()
            self.short.clear()
        self.table[key] = runner

    def forget(self) -> None:
        """Forget every decided call."""
        self.table.clear()
        self.short.clear()


Recorder = Callable[[Any], None]

_lock = threading.Lock()
_serials = itertools.count()
_scopes: dict[Settings, Scope] = {}
_by_serial: dict[int, Scope] = {}
_default: Preference | None = None
_environment: Preference | None = None
_checks: bool | None = None
_generation = 0


def scope_for(settings: Settings) -> Scope:
    """Give the one scope with these settings."""
    found = _scopes.get(settings)
    if found is not None:
        return found
    with _lock:
        found = _scopes.get(settings)
        if found is None:
            if len(_scopes) >= _MAX_SCOPES:
                # Scopes still in force somewhere live on there; only the way to find them again is dropped.
                for stale in list(_scopes)[1:]:
                    _scopes.pop(stale)
            found = Scope(settings, next(_serials))
            _scopes[settings] = found
            _by_serial[found.serial] = found
        return found


_BASE: Final = scope_for(Settings())

current: Final[contextvars.ContextVar[Scope]] = contextvars.ContextVar("anyattn_scope", default=_BASE)
"""The scope in force in this thread or task."""

Entered = tuple[str, tuple[str, ...], Mode, str, Precision, bool]


class _Thread(threading.local):
    """What belongs to one thread: pins and blocks entered by compiled code, which can't set a context variable."""

    def __init__(self) -> None:
        self.entered: list[Entered] = []


thread: Final = _Thread()
"""This thread's. Traced code reaches it as `anyattn._in_force.entered`; eager code below a graph break finds in it what
the compiled code around it entered."""

outer: Final[contextvars.ContextVar[tuple[Scope, ...]]] = contextvars.ContextVar("anyattn_outer", default=())
"""The scopes to go back to at the end of each block."""


def derive(scope: Scope, **changes: Any) -> Scope:
    """Give the scope with some settings changed, keeping its recorder."""
    found = scope_for(replace(scope.settings, **changes))
    return found if scope.recorder is None else recording(found, scope.recorder)


def enter(scope: Scope, wish: Preference, override: bool) -> Scope:
    """Give the scope inside an `attention_backend` block."""
    # Keyed by identity, which costs less than hashing a preference; the entry keeps the object alive.
    found = scope.entered.get((id(wish), override))
    if found is None:
        found = (wish, derive(scope, context=wish, override=override, precision=wish.precision))
        if scope.recorder is None and len(scope.entered) < _MAX_SCOPES:
            scope.entered[id(wish), override] = found
    return found[1]


def recording(scope: Scope, recorder: Recorder) -> Scope:
    """Give a scope of the same settings whose calls are all told to `recorder`."""
    return Scope(scope.settings, scope.serial, recorder)


def preference(names: tuple[str, ...], *, is_list: bool, source: str, precision: Precision = "exact") -> Preference:
    """Make a preference: one explicit name is required, a list or `auto` is a preference."""
    mode: Mode = "prefer" if is_list or names == ("auto",) else "require"
    return Preference(names, mode, source, precision)


def process_default() -> Preference:
    """Give what applies where no block or pin does."""
    global _environment
    if _default is not None:
        return _default
    if _environment is None:
        _environment = from_environment(os.environ)
    return _environment


def from_environment(environ: Mapping[str, str]) -> Preference:
    """Read the environment variables; names are checked where they are used, so that import never fails."""
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
    global _environment, _checks, _generation
    with _lock:
        _environment = None
        _checks = None
        _generation += 1
        for scope in _by_serial.values():
            scope.forget()


def means_yes(word: str) -> bool | None:
    """Read a word as yes or no, whatever its case; None where it is neither."""
    word = word.strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def checks_enabled() -> bool:
    """Whether the value checks are asked for; read once, and again after `forget`.

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
                    f"{variable} is {word!r}; write 1, yes, true or on to add the value checks, or 0 to leave them out."
                )
            found = found or wanted
        _checks = found
    return _checks


_faults: dict[tuple[str, Any], Any] = {}
_load_errors: dict[str, Exception] = {}
_said_faults: set[tuple[str, Any]] = set()


def add_fault(backend: str, spec: Any, reason: Any, error: Exception | None = None) -> None:
    """Note that a backend failed for a spec (None: that it can't be loaded, with why); decisions are forgotten."""
    with _lock:
        if (backend, spec) in _faults:
            return
        _faults[backend, spec] = reason
        if error is not None:
            _load_errors[backend] = error
    forget()


def faults(spec: Any) -> dict[str, Any]:
    """Give the reason against each backend that failed for a spec, or couldn't be loaded at all."""
    if not _faults:
        return {}
    with _lock:
        return {name: reason for (name, at), reason in _faults.items() if at is None or at == spec}


def broken_loads() -> dict[str, Any]:
    """Give the reason against each backend that couldn't be loaded."""
    with _lock:
        return {name: reason for (name, at), reason in _faults.items() if at is None}


def load_error(backend: str) -> Exception | None:
    """Give what a backend's kernel raised when it was imported; importing it again may raise something else."""
    return _load_errors.get(backend)


def fault_is_said(backend: str, spec: Any) -> bool:
    """Whether a person was told of a fault before; from now on they were."""
    with _lock:
        said = (backend, spec) in _said_faults
        _said_faults.add((backend, spec))
    return said


def forget_faults() -> None:
    """Let every backend that failed be tried again."""
    with _lock:
        _faults.clear()
        _load_errors.clear()
        _said_faults.clear()


_overrides: dict[str, str] = {}


def follow(overrides: Mapping[str, str]) -> bool:
    """Forget every decided call where torch's kernels were replaced, or put back, since this was last asked.

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
    """Give a number that `forget` changes: what was decided under another one is not to be remembered."""
    return _generation


def token() -> str:
    """Name the scope in force, for torch.compile to guard on."""
    scope = current.get()
    return f"{scope.serial}.{_generation}"


def plain(kind: str, wish: Preference, override: bool = False) -> Entered:
    """Write a pin or block as plain constants, which traced code can hold."""
    return (kind, wish.names, wish.mode, wish.source, wish.precision, override)


def scope_of_token(text: str, entered: tuple[Entered, ...] = ()) -> Scope:
    """Find the scope that a token names, with what the traced code itself entered on top."""
    return with_entered(_by_serial.get(int(text.partition(".")[0]), _BASE), entered)


def with_entered(scope: Scope, entered: tuple[Entered, ...]) -> Scope:
    """Give a scope with what compiled code entered on top."""
    settings = scope.settings
    for kind, names, mode, source, precision, override in entered:
        wish = Preference(names, mode, source, precision)
        if kind == "pin":
            settings = replace(settings, pin=wish)
        else:
            settings = replace(settings, context=wish, override=override, precision=precision)
    found = scope_for(settings)
    return found if scope.recorder is None else recording(found, scope.recorder)
