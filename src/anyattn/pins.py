"""Pins: a backend for a module and all that is inside it, put in force while its forward runs.

Every module of the tree that isn't torch's own gets the hooks, not only the root: gradient checkpointing runs
inner modules again during the backward, on another thread, where no outer forward is on the stack.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from anyattn import _in_force, lifetime, policy
from anyattn.decision import Precision, Preference
from anyattn.dispatch import make_preference

_OWN = "_anyattn_pin"
_EFFECTIVE = "_anyattn_pin_in_force"
_HANDLES = "_anyattn_pin_handles"


class _Entry(NamedTuple):
    """A module whose forward is running: the scope to go back to, if it changed, and the frame that runs it."""

    module: int
    before: policy.Scope | None
    frame: FrameType


class _Stack(threading.local):
    def __init__(self) -> None:
        self.entries: list[_Entry] = []


_stack = _Stack()
_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def pin(module: nn.Module, backend: str | list[str] | tuple[str, ...], *, precision: Precision = "exact") -> None:
    """Pin a module: its attention, and that of everything inside it without a pin of its own.

    Args:
        module: Any module.
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        precision: The loosest precision that lists and `auto` may use.

    Raises:
        UnknownBackendError: If a name is unknown; nothing is changed then.
    """
    module.__dict__[_OWN] = make_preference(backend, "model", precision)
    _roots.add(module)
    _spread(module, None)


def unpin(module: nn.Module) -> bool:
    """Take a module's own pin back, and nothing else; say whether there was one.

    What an enclosing module pins applies again.
    """
    if module.__dict__.pop(_OWN, None) is None:
        return False
    _roots.discard(module)
    _spread(module, None)
    # A module doesn't know what encloses it or shares its parts, so every pin is laid out again.
    for root in list(_roots):
        _spread(root, None)
    return True


def pin_of(module: nn.Module) -> Preference | None:
    """Give the pin in force for a module: its own, or the nearest enclosing one."""
    found: Preference | None = module.__dict__.get(_EFFECTIVE)
    return found


def _spread(module: nn.Module, inherited: Preference | None) -> None:
    own: Preference | None = module.__dict__.get(_OWN)
    effective = own if own is not None else inherited
    if effective is None:
        module.__dict__.pop(_EFFECTIVE, None)
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
    else:
        module.__dict__[_EFFECTIVE] = effective
        if _HANDLES not in module.__dict__ and not _is_torch_own(module):
            module.__dict__[_HANDLES] = (
                module.register_forward_pre_hook(_enter, prepend=True),
                module.register_forward_hook(_leave, always_call=True),
            )
    for child in module.children():
        _spread(child, effective)


def _is_torch_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def live_scope(scope: policy.Scope) -> policy.Scope:
    """Give the scope that is truly in force where a pin is, or where compiled code entered something.

    A pin is left behind where its module's forward was broken off by what isn't an Exception (Ctrl-C), after which
    torch runs no hook: then it is taken back here. Blocks that ended elsewhere, those of generators, and what compiled
    code entered are `anyattn.lifetime`'s.
    """
    entries = _stack.entries
    while entries and not _is_running(entries[-1].frame):
        _take_back(entries.pop())
        scope = policy.current.get()
    return lifetime.in_force(scope)


def settled(scope: policy.Scope) -> policy.Scope:
    """Give the scope that this context holds, once a pin that was left behind is taken back."""
    live_scope(scope)
    return policy.current.get()


def _is_running(wanted: FrameType) -> bool:
    """Whether a frame is on this thread's stack; a pinned module's is a few frames up from its attention."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False


def _take_back(entry: _Entry) -> None:
    if entry.before is not None:
        policy.current.set(entry.before)


def _enter(module: nn.Module, args: Any) -> None:
    preference: Preference | None = getattr(module, _EFFECTIVE, None)
    if torch.compiler.is_dynamo_compiling():
        if preference is not None:
            _in_force.entered.append(policy.plain("pin", preference))
        return
    live_scope(policy.current.get())
    before = None
    if preference is not None:
        scope = policy.current.get()
        if scope.settings.pin is not preference:
            before = scope
            policy.current.set(policy.derive(scope, pin=preference))
    _stack.entries.append(_Entry(id(module), before, sys._getframe(1)))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        if getattr(module, _EFFECTIVE, None) is not None:
            _in_force.entered.pop()
        return
    entries = _stack.entries
    # Where another hook raised before ours ran there is nothing of this module's to undo.
    if entries and entries[-1].module == id(module):
        _take_back(entries.pop())
