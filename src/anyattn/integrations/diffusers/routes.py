"""Models that Diffusers' own setter gave to anyattn: no backend is pinned, anyattn's settings decide.

The hooks stand on every module that isn't torch's own, for the reason that `anyattn.pins` gives.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from typing import Any, Final

import torch
from torch import nn

_HANDLES: Final = "_anyattn_route_handles"

_depth: Final[contextvars.ContextVar[int]] = contextvars.ContextVar("anyattn_diffusers_routes", default=0)
_roots: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

traced: Final[list[bool]] = []
"""Routed modules entered while torch.compile traces; it sees a list, and can't see a context variable."""


class _Stack(threading.local):
    def __init__(self) -> None:
        self.entries: list[tuple[int, contextvars.Token[int]]] = []


_stack = _Stack()


def running() -> bool:
    """Whether the forward of a routed module is running, in this thread or task."""
    return _depth.get() > 0


def exist() -> bool:
    """Whether any module is routed."""
    return len(_roots) > 0


def add(module: nn.Module) -> None:
    """Route a module and all that is inside it."""
    _roots.add(module)
    for part in module.modules():
        if _HANDLES not in part.__dict__ and not type(part).__module__.startswith("torch.nn."):
            part.__dict__[_HANDLES] = (
                part.register_forward_pre_hook(_enter, prepend=True),
                part.register_forward_hook(_leave, always_call=True),
            )


def remove(module: nn.Module) -> bool:
    """Take a route back, from a module or from what is inside it; say whether there was one."""
    found = False
    for part in module.modules():
        _roots.discard(part)
        for handle in part.__dict__.pop(_HANDLES, ()):
            found = True
            handle.remove()
    for root in list(_roots):  # parts may belong to a root that stays
        add(root)
    return found


def remove_all() -> None:
    """Take every route back."""
    for root in list(_roots):
        remove(root)


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        traced.append(True)
        return
    _stack.entries.append((id(module), _depth.set(_depth.get() + 1)))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        traced.pop()
        return
    entries = _stack.entries
    if entries and entries[-1][0] == id(module):
        _depth.reset(entries.pop()[1])
