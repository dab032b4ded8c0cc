"""The life of blocks and records, which may begin and end anywhere and in any order.

A block is in force in the context that entered it and in copies of that context, until it is left; then nowhere. A
block that a generator or coroutine entered is also in force at each step of that function, in any context, task or
thread: it is found by the function's frame on the stack. If several are in force, the one deepest on the stack counts.
So a generator's own block beats one that its consumer entered between two steps.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Final, TypeVar

from anyattn.scopes import scopes, tokens
from anyattn.scopes.scopes import Life, Owner, Scope
from anyattn.scopes.values import Settings

_SUSPENDABLE: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_PASSED: Final = frozenset(
    ("__enter__", "__aenter__", "enter_context", "enter_async_context", "__exit__", "__aexit__", "close", "aclose")
)
"""Functions that enter and leave blocks on behalf of their caller."""
_ENTERING: Final = frozenset(("__enter__", "__aenter__"))

held: Final[dict[Life, None]] = {}
"""The lives that generators and coroutines entered, oldest first; while it is empty no call looks for frames."""

_current = scopes.current
_get = _current.get
_set = _current.set
_thread = scopes.thread

Result = TypeVar("Result")


def _holders(frame: FrameType | None) -> tuple[FrameType, ...]:
    """Return the generators and coroutines whose `with` statement a frame enters or leaves, innermost first.

    If a generator is used as a context manager, the body of the `with` statement is in its user, which counts too.
    """
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_name not in _PASSED:
            if not code.co_flags & _SUSPENDABLE:
                break
            found.append(frame)
            frame = frame.f_back
            if frame is None or frame.f_code.co_name not in _ENTERING:
                break
            continue
        frame = frame.f_back
    return tuple(found)


def begin(owner: Owner, scope: Scope, frame: FrameType) -> Life:
    """Put a block or record in force in this context (in which `scope` is), and at the steps of a frame's function."""
    life = Life()
    life.owner = owner
    life.thread = thread = _thread.entered
    if owner.thread is not thread:
        if owner.thread is not None:
            owner.threads += (owner.thread,)
        owner.thread = thread
    owner.lives.append(life)
    if scope.stale:
        scope = _healed()
    if held or thread:
        _place(life)
    code = frame.f_code
    if code.co_flags & _SUSPENDABLE or code.co_name in _PASSED:
        life.frames = _holders(frame)
        if life.frames:
            held[life] = None
    wish = owner.wish
    if wish is None or scope.records:
        made = scopes.enter(scope, life)
    else:  # `scopes.enter` inlined, since blocks are entered in hot loops
        found = scope.base.entered.get(id(wish) + owner.override)
        base = scopes.base_of(scope.base, wish, owner.override) if found is None else found[1]
        made = life.scope = Scope(base, scope, life, life, ())
    _set(made)
    return life


def _place(life: Life) -> None:
    """Record what is further out on the stack than a life that begins."""
    life.inside = frozenset(_on_stack(held))
    life.compiled = (_thread.entered, len(_thread.entered))


def end(life: Life) -> None:
    """End a block or record, in every context."""
    life.ended = True
    if life.frames:
        held.pop(life, None)
        life.frames = ()
    scope = life.scope
    if scope is not None:
        life.scope = None
        outer = scope.outer
        if scope.above is None and outer is not None and outer.above is None:
            scope.stale = scope.look = True
        else:
            _mark(scope, life)
    if life.more is not None:
        for other in list(life.more):
            _mark(other, life)
    scope = _get()
    if scope.stale:
        outer = scope.outer
        _set(outer if scope.life is life and outer is not None and not outer.stale else _rebuilt(scope, None))


def leave(owner: Owner) -> Life | None:
    """End the life, of an object's lives, that the caller's caller leaves, and return it; None if there is none."""
    lives = owner.lives
    if not lives:
        return None
    scope = _get()
    life = lives[0]
    if len(lives) > 1 or scope.life is not life:
        left = _left(list(lives), sys._getframe(2), scope)
        if left is None:
            return None
        life = left
    try:
        lives.remove(life)
    except ValueError:  # another thread was faster
        return None
    end(life)
    return life


def _left(lives: list[Life], frame: FrameType, scope: Scope) -> Life | None:
    """Find the life that is left: the calling generator's, this context's, this thread's, or another thread's."""
    lives = lives[::-1]
    holders = _holders(frame)
    if holders:
        for life in lives:
            if life.frames[:1] == holders[:1]:
                return life
    chain: list[Life] = []
    at: Scope | None = scope
    while at is not None:
        if at.life is not None and at.life in lives:
            chain.append(at.life)
        at = at.outer
    here = _thread.entered
    for found in (chain, [life for life in lives if life.thread is here]):
        if found:
            return next((life for life in found if not life.frames), found[0])
    owner = lives[0].owner
    # If a thread that entered it leaves it once too often, it stays in force in the other threads.
    return None if any(one is here for one in (owner.thread, *owner.threads)) else lives[0]


def _mark(scope: Scope, ended: Life | None = None) -> None:
    scope.stale = scope.look = True
    outer = scope.outer
    if ended is not None and outer is not None and outer.above:
        outer.above.pop(ended, None)
    if scope.above:
        above = list(scope.above.values())
        scope.above = None
        for other in above:
            _mark(other)


def _healed() -> Scope:
    """Return this context's scope, without the blocks that have ended."""
    scope = _get()
    if scope.stale:
        scope = _heal(scope)
        _set(scope)
    return scope


def _heal(scope: Scope) -> Scope:
    """Make a scope again from the blocks that haven't ended."""
    return _rebuilt(scope, None) if scope.stale else scope


def _rebuilt(scope: Scope, without: Life | None) -> Scope:
    """Make a scope again from the blocks that haven't ended, without one life."""
    inner: list[Scope] = []
    at = scope
    while at.outer is not None and (at.stale or without is not None):
        inner.append(at)
        at = at.outer
    for one in reversed(inner):
        if one.life is None:
            at = scopes.derive(at, pin=one.settings.pin, routed=one.settings.routed)
        elif one.life.ended or one.life is without:
            continue
        else:
            at = one if one.outer is at and not one.stale else scopes.enter(at, one.life)
    return at


def in_force(scope: Scope) -> Scope:
    """Return the scope in force at a call in whose context `scope` is.

    It leaves out blocks that have ended, and adds those that generators on the stack and compiled code entered.
    """
    scope = _found(scope)
    entered = _thread.entered
    if entered:
        under, deeper = _compiled_code(scope.block)
        if not under:
            entered.clear()  # the compiled code was interrupted
            return scope
        mark = None if scope.block is None else scope.block.compiled
        start = mark[1] if mark is not None and mark[0] is entered else 0
        scope = tokens.with_entered(scope, tuple(entered), start if deeper else len(entered))
    return scope


def token() -> str:
    """Return the name of the scope in force, for torch.compile to guard on, without what compiled code entered."""
    return tokens.token(_found(_get()))


def settings() -> Settings:
    """Return the settings in force, without what compiled code entered."""
    return _found(_get()).settings


def _found(scope: Scope) -> Scope:
    if scope.stale:
        scope = _healed()
    return _with_held(scope) if held else scope


def _with_held(scope: Scope) -> Scope:
    """Add the blocks that generators on this stack entered and that the context doesn't have."""
    block = scope.block
    known = frozenset() if block is None else block.inside
    away = [
        life
        for life in list(held)
        if (life is not block and life not in known if life.tell is None else life not in scope.records)
    ]
    found = _on_stack(away)
    if not found:
        return scope
    base = scope.base
    for life in found:
        wish = life.owner.wish
        if wish is not None:
            base, block = scopes.base_of(base, wish, life.owner.override), life
            break
    records = (*scope.records, *(life for life in found if life.tell is not None))
    return Scope(base, None, None, block, records)


def _on_stack(lives: Iterable[Life]) -> list[Life]:
    """Return the lives whose function runs on this thread's stack, the innermost first."""
    wanted: dict[FrameType, list[Life]] = {}
    for life in list(lives):
        for frame in life.frames:
            if frame.f_back is not None:  # None while it is suspended
                wanted.setdefault(frame, []).insert(0, life)
    found: dict[Life, None] = {}
    at: FrameType | None = sys._getframe(1) if wanted else None
    while at is not None and wanted:
        for life in wanted.pop(at, ()):
            found.setdefault(life)
        at = at.f_back
    return list(found)


def _compiled_code(block: Life | None) -> tuple[bool, bool]:
    """Whether this thread runs compiled code, and whether deeper on the stack than a block's function.

    The wrapper of compiled code is a frame of torch's `eval_frame.py`.
    """
    frames = () if block is None else block.frames
    frame: FrameType | None = sys._getframe(2)
    deeper = True
    while frame is not None:
        if frame.f_code.co_filename.endswith("eval_frame.py"):
            return True, deeper
        if frame in frames:
            deeper = False
        frame = frame.f_back
    return False, False


def stepping(owner: Owner) -> Life:
    """Return a life that is in force only while its function runs; see `step`."""
    life = Life()
    life.owner = owner
    life.more = weakref.WeakSet()  # one for each step
    return life


def step(life: Life, resume: Callable[..., Result], arguments: Sequence[Any]) -> Result:
    """Run one step of a decorated generator or coroutine with its block in force, and only then."""
    before = _healed()
    if held or _thread.entered:
        _place(life)
    inside = scopes.enter(before, life)
    _set(inside)
    try:
        return resume(*arguments)
    finally:
        now = _get()
        _set(_heal(before) if now is inside else _rebuilt(now, life))
