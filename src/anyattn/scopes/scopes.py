"""Scopes: the settings in force at one point of a program, with the table of calls decided under them.

The state of a thread or task is one `Scope`, in a context variable. Scopes with equal settings share one table, so the
hot path is one look-up. `defaults` holds the settings of the process, `lifetime` begins and ends blocks. torch.compile
can't read a context variable; it reads `anyattn.scopes._in_force.token` and guards on that.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any, Final

from torch import Tensor

from anyattn.process.bounded import Bounded
from anyattn.records import times
from anyattn.scopes.values import Settings
from anyattn.types.decision import Mode, Precision, Preference

REPLACE_SDPA: Final = "replace_sdpa"
"""The source of a preference that a `replace_sdpa` block made."""

_MOST_SCOPES = 256
_MOST_CALLS = 4096


class Scope:
    """Settings in force, with the table of calls decided under them.

    Equal settings have one `Base`. Each block or record makes a `Scope` of its own, which shares the tables of its base
    and knows its outer scope, so it can end at any time and in any order.
    """

    __slots__ = (
        "__weakref__",
        "above",
        "asked",
        "base",
        "block",
        "life",
        "look",
        "outer",
        "recorder",
        "records",
        "settings",
        "short",
        "stale",
        "table",
    )
    base: Base
    settings: Settings
    look: bool
    asked: bool
    outer: Scope | None
    life: Life | None
    block: Life | None
    records: tuple[Life, ...]
    recorder: Recorder | None
    table: dict[Any, Any]
    short: dict[Any, Any]
    above: dict[Any, Scope] | None

    def __init__(
        self, base: Base, outer: Scope | None, life: Life | None, block: Life | None, records: tuple[Life, ...]
    ) -> None:
        self.base = base
        self.settings = base.settings
        self.look = False  # whether a call must read more than this scope
        self.asked = base.asked
        self.stale = False  # whether a block that this scope depends on has ended
        self.outer = outer
        self.life = life  # the block or record that made this scope
        self.block = block  # the innermost block
        self.records = records
        self.above = None  # the scopes to make again when this one goes stale
        if records:
            self.recorder = Recorder(records)
            self.table, self.short = Bounded(_MOST_CALLS), Bounded(_MOST_CALLS)
        else:
            self.recorder = None
            self.table, self.short = base.table, base.short

    def preference(self) -> Preference:
        """Return the preference in force: pin, then block, then process default, then environment, then native."""
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
        """Return which preference a more specific one overruled, in words; empty if none was."""
        settings = self.settings
        if settings.pin is None or settings.context is None or settings.pin.names == settings.context.names:
            return ""
        pin = f"{settings.pinned_by} to {settings.pin}"
        block = f"attention_backend({settings.context}{', override=True' if settings.override else ''})"
        return f"{pin} by {block}" if settings.override else f"{block} by {pin}"

    def remember(self, key: Any, runner: Any) -> None:
        """Put a decided call into the table."""
        self.table[key] = runner

    def forget(self) -> None:
        """Forget every decided call."""
        self.table.clear()
        self.short.clear()


class Base(Scope):
    """The one scope for its settings; it owns the tables."""

    __slots__ = ("calls", "entered", "inner", "text")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.look = self.stale = False
        # Whether a block, pin or route asks a host to call anyattn; a process default doesn't.
        self.asked = settings.context is not None or settings.pin is not None or settings.routed
        self.base = self
        self.outer = self.life = self.block = self.recorder = self.above = None
        self.records = ()
        # Decided calls; those without a mask that need no further checks are in `short`, under a shorter key.
        self.table, self.short = Bounded(_MOST_CALLS), Bounded(_MOST_CALLS)
        self.entered: dict[int, tuple[Preference, Base]] = {}
        self.inner: dict[int, tuple[Preference | None, Base]] = {}
        self.calls: Bounded[Any, Scope] = Bounded(1024)
        self.text = ""


class Life:
    """One use of a block or record, from entering to leaving; the two may be in different contexts or threads."""

    ended = False
    frames: tuple[FrameType, ...] = ()
    """The generators and coroutines at whose steps this is in force; see `scopes.lifetime`."""
    inside: frozenset[Life] = frozenset()
    """The lives of the generators and coroutines that were running further out when this began."""
    compiled: tuple[list[Entered], int] | None = None
    """What compiled code had entered in that thread when this began: the list, and its length then."""

    tell: Callable[[Any, Any], None] | None = None
    """For a record: called with each decision, and the call's span of time."""
    timed = False
    """For a record: whether calls are timed."""
    scope: Scope | None = None
    """The scope that it made; `more` holds those that were made again on another outer scope."""
    more: weakref.WeakSet[Scope] | None = None

    owner: Owner
    thread: list[Entered]
    """The list of the thread that began it."""


class Owner:
    """A block or record as an object that can be entered any number of times."""

    wish: Preference | None = None
    override = False
    thread: list[Entered] | None = None
    threads: tuple[list[Entered], ...] = ()
    """The lists of the last thread that entered it, and of those before."""

    def __init__(self) -> None:
        self.lives: list[Life] = []


class Recorder:
    """The records that a call is told to, one inside the other."""

    __slots__ = ("records",)

    def __init__(self, records: tuple[Life, ...]) -> None:
        self.records = records

    def start(self, tensor: Tensor) -> Any:
        """Begin to time a call, if a record asks for that."""
        return times.started(tensor) if any(life.timed for life in self.records) else None

    def __call__(self, decision: Any, start: Any = None) -> None:
        """Record a call that has just been made."""
        span = times.stopped(start)
        for life in self.records:
            if life.tell is not None and not life.ended:
                life.tell(decision, span if life.timed else None)


# Reentrant: garbage collection can end a generator, and its block with it, at any point.
lock = threading.RLock()
_scopes: dict[Settings, Base] = {}
_alive: weakref.WeakSet[Base] = weakref.WeakSet()

process_default: Callable[[], Preference] = lambda: Preference(("native",), "require", "built-in")  # noqa: E731
"""Returns the preference that applies without a block or pin; `defaults` sets it."""

generation = 0
"""A number that `forget_decisions` changes; a call decided under another number must not be stored."""


def scope_for(settings: Settings) -> Base:
    """Return the one scope with these settings."""
    found = _scopes.get(settings)
    if found is not None:
        return found
    with lock:
        found = _scopes.get(settings)
        if found is None:
            if len(_scopes) >= _MOST_SCOPES:
                _drop_scopes()
            found = Base(settings)
            _scopes[settings] = found
            _alive.add(found)
        return found


def _drop_scopes() -> None:
    """Drop the cached scopes; those in force somewhere stay in force there."""
    for stale in list(_scopes)[1:]:
        _scopes.pop(stale)
    for scope in list(_alive):
        scope.entered.clear()
        scope.inner.clear()
        scope.calls.clear()


_BASE: Final = scope_for(Settings())

current: Final[contextvars.ContextVar[Scope]] = contextvars.ContextVar("anyattn_scope", default=_BASE)
"""The scope in force in this thread or task."""

Entered = tuple[str, tuple[str, ...], Mode, str, Precision, bool]


class _Thread(threading.local):
    """One thread's pins and blocks that compiled code entered, since that can't set a context variable."""

    def __init__(self) -> None:
        self.entered: list[Entered] = []


thread: Final = _Thread()
"""The state of this thread. Traced code reads it as `anyattn.scopes._in_force.entered`; eager code below a graph break
finds in it what the surrounding compiled code entered."""


def changed(scope: Scope, **changes: Any) -> Scope:
    """Return the scope with some settings changed, for one call; its records stay."""
    found = scope_for(replace(scope.settings, **changes))
    return Scope(found, None, None, scope.block, scope.records) if scope.records else found


def derive(scope: Scope, **changes: Any) -> Scope:
    """Return the scope with a pin or route changed, to put in force; it ends with the blocks outside it."""
    return _upon(scope, scope_for(replace(scope.settings, **changes)))


def inside(scope: Scope, pin: Preference | None) -> Scope:
    """Return the scope inside a module with a pin; with None, inside one that its host's own setter routed here."""
    settings = scope.settings
    if settings.routed if pin is None else settings.pin is pin:
        return scope
    base = scope.base
    found = base.inner.get(id(pin))  # keyed as in `base_of`
    if found is None:
        found = (pin, scope_for(replace(settings, routed=True) if pin is None else replace(settings, pin=pin)))
        if len(base.inner) < _MOST_SCOPES:
            base.inner[id(pin)] = found
    return _upon(scope, found[1])


def leave(before: Scope, inner: Scope) -> None:
    """End what `inside` began, and no block that began or ended meanwhile."""
    scope = current.get()
    if scope is not inner and scope is not before:
        before = derive(scope, pin=before.settings.pin, routed=before.settings.routed)
    current.set(before)


def _upon(scope: Scope, found: Base) -> Scope:
    if scope.outer is None:
        return found
    made = None if scope.above is None else scope.above.get(found)
    if made is None:
        made = Scope(found, scope, None, scope.block, scope.records)
        _stand(made, scope, found)
    return made


def _stand(made: Scope, outer: Scope, key: object) -> None:
    """Record that a scope must be made again when its outer scope goes stale."""
    if outer.above is None:
        outer.above = {}
    outer.above[key] = made
    if outer.stale:
        made.stale = made.look = True


def base_of(base: Base, wish: Preference, override: bool) -> Base:
    """Return the base of the scope inside a block."""
    # Keyed by identity (an even number), which costs less than hashing a preference; the entry keeps the object alive.
    key = id(wish) + override
    found = base.entered.get(key)
    if found is None:
        sdpa = base.settings.sdpa or wish.source == REPLACE_SDPA
        settings = replace(base.settings, context=wish, override=override, precision=wish.precision, sdpa=sdpa)
        found = (wish, scope_for(settings))
        if len(base.entered) < _MOST_SCOPES:
            base.entered[key] = found
    return found[1]


def enter(scope: Scope, life: Life) -> Scope:
    """Return the scope inside a block or record."""
    wish = life.owner.wish
    if wish is not None:
        records = scope.records
        made = Scope(base_of(scope.base, wish, life.owner.override), scope, life, life, records)
        if records:
            _stand(made, scope, life)
    else:
        made = Scope(scope.base, scope, life, scope.block, (*scope.records, life))
        if scope.outer is not None:
            _stand(made, scope, life)
    if life.scope is None and life.more is None:
        life.scope = made
    else:
        if life.more is None:
            life.more = weakref.WeakSet()
        life.more.add(made)
    if life.ended:
        made.stale = made.look = True
    return made


def forget_decisions() -> None:
    """Forget every decided call; compiled code is compiled again."""
    global generation
    with lock:
        generation += 1
        for scope in list(_alive):
            scope.forget()
