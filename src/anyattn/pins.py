"""Pins: a backend for a module and all that is inside it, put in force while its forward runs.

Every module of the tree that isn't torch's own gets the hooks, not only the root: gradient checkpointing runs
inner modules again during the backward, on another thread, where no outer forward is on the stack.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from anyattn import policy
from anyattn.decision import Precision, Preference
from anyattn.dispatch import make_preference

_OWN = "_anyattn_pin"
_EFFECTIVE = "_anyattn_pin_in_force"
_HANDLES = "_anyattn_pin_handles"


class _Stack(threading.local):
    def __init__(self) -> None:
        self.entries: list[tuple[int, Any]] = []


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
    # A module doesn't know what encloses it, so every pinned module is asked.
    for root in list(_roots):
        if any(part is module for part in root.modules()):
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


def _enter(module: nn.Module, args: Any) -> None:
    preference: Preference | None = getattr(module, _EFFECTIVE, None)
    if torch.compiler.is_dynamo_compiling():
        if preference is not None:
            policy.traced.append(policy.plain("pin", preference))
        return
    changed = None
    if preference is not None:
        scope = policy.current.get()
        if scope.settings.pin is not preference:
            changed = policy.current.set(policy.derive(scope, pin=preference))
    _stack.entries.append((id(module), changed))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        if getattr(module, _EFFECTIVE, None) is not None:
            policy.traced.pop()
        return
    entries = _stack.entries
    # Where another hook raised before ours ran there is nothing of this module's to undo.
    if entries and entries[-1][0] == id(module):
        changed = entries.pop()[1]
        if changed is not None:
            policy.current.reset(changed)
