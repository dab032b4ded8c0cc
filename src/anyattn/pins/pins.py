"""Pins: a backend for a module and everything inside it, in force while it runs.

The root is covered, and so is every module inside it that may compute attention: gradient checkpointing runs inner
modules again during the backward, on another thread and outside the root's forward. All other modules stay unchanged.
"""

from __future__ import annotations

import threading
import weakref

from torch import nn

from anyattn.pins import attending
from anyattn.pins.covering import OWN_PIN, PIN, Host, Mark, adopt, cover, is_covered, live, refresh, uncover
from anyattn.scopes import defaults, lifetime
from anyattn.selection.preferences import make_preference
from anyattn.types.decision import Precision, Preference

_lock = threading.RLock()
_roots: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def pin(
    module: nn.Module,
    backend: str | list[str] | tuple[str, ...],
    *,
    precision: Precision = "exact",
    host: Host | None = None,
    judged: frozenset[type] = frozenset(),
) -> Mark:
    """Pin a module: its attention, and that of every module inside it without a pin of its own.

    Args:
        module: Any module.
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        precision: The loosest precision that lists and `auto` may use.
        host: The integration that sets it; it is called for copies.
        judged: The classes that the host has checked; see `anyattn.pins.covering.Mark`.

    Returns:
        What the pinned modules hold.

    Raises:
        UnknownBackendError: If a name is unknown; nothing is changed then.
    """
    wish = make_preference(backend, "model", precision)
    with _lock:
        mark: Mark | None = module.__dict__.get(OWN_PIN)
        if mark is None or mark.owner() is not module:  # none yet, or shared with the module this is a shallow copy of
            mark = module.__dict__[OWN_PIN] = Mark()
            mark.owner = weakref.ref(module)
        mark.preference, mark.host, mark.judged = wish, host, judged
        _add_root(module)
        _lay_out(module)
        return mark


def unpin(module: nn.Module) -> bool:
    """Remove a module's own pin, and nothing else; return whether there was one.

    The pin of an enclosing module applies again. For a part that was copied out of a pinned model, the inherited pin
    counts as its own.
    """
    with _lock:
        mark: Mark | None = module.__dict__.pop(OWN_PIN, None)
        found = mark is not None and mark.preference is not None
        if mark is not None and mark.owner() is module:
            mark.clear()
        if mark is None:
            found = _drop_orphans(module)
        for number in [number for number, root in _roots.items() if root is module]:
            del _roots[number]
        if mark is not None:
            _spread(module, None, frozenset())
        # A module doesn't know what encloses it or shares its parts, so every pin is applied again.
        for root in list(_roots.values()):
            _lay_out(root)
        return found


def unpin_all(host: Host) -> None:
    """Remove every pin that an integration set, including those of copies."""
    for root in list(_roots.values()):
        if is_hosted(root, host):
            unpin(root)
    for mark in list(live):
        if mark.host is host:
            mark.preference = None


def is_hosted(module: nn.Module, host: Host) -> bool:
    """Whether a module has a pin of its own that an integration set."""
    mark = _own(module)
    return mark is not None and mark.host is host


def pin_of(module: nn.Module) -> Preference | None:
    """Return the pin in force for a module: its own, or the nearest enclosing one."""
    mark: Mark | None = module.__dict__.get(PIN)
    if mark is None:
        marks = (_enclosing(root, module, None) for root in reversed(list(_roots.values())))
        mark = next((found for found in marks if found is not None), None)
    elif not is_covered(module):
        return None  # a copy that was made without the covered class
    if mark is None or mark.preference is None:
        return None
    return mark.preference if mark.host is None or mark.host.reaches(module) else None


def _enclosing(root: nn.Module, wanted: nn.Module, inherited: Mark | None) -> Mark | None:
    mark = _own(root) or inherited
    if root is wanted:
        return mark
    for child in root.children():
        found = _enclosing(child, wanted, mark)
        if found is not None:
            return found
    return None


def _own(module: nn.Module) -> Mark | None:
    mark: Mark | None = module.__dict__.get(OWN_PIN)
    return mark if mark is not None and mark.preference is not None else None


def _add_root(module: nn.Module) -> None:
    if not any(root is module for root in list(_roots.values())):
        _roots[max(_roots.keys(), default=0) + 1] = module


def _lay_out(root: nn.Module) -> None:
    mark = _own(root)
    if mark is None:
        return
    roots = [root, *(part for part in root.modules() if part is not root and _own(part) is not None)]
    _spread(root, None, frozenset(id(module) for part in roots for module in attending.modules(part)))
    mark.harmless = frozenset(type(module) for module in root.modules() if not is_covered(module))


def _spread(module: nn.Module, inherited: Mark | None, covered: frozenset[int]) -> None:
    own = _own(module)
    mark = own or inherited
    if mark is not None and (own is not None or id(module) in covered):
        module.__dict__[PIN] = mark
        cover(module)
    elif PIN in module.__dict__:
        del module.__dict__[PIN]
        uncover(module)
    for child in module.children():
        _spread(child, mark, covered)


def _drop_orphans(part: nn.Module) -> bool:
    """Remove what a part inherited from a root that wasn't copied along, or that is gone."""
    found = False
    for module in part.modules():
        mark: Mark | None = module.__dict__.get(PIN)
        if mark is not None and mark.owner() is None:
            found = found or (mark.preference is not None and is_covered(module))
            del module.__dict__[PIN]
            uncover(module)
    return found


def _refresh(root: nn.Module) -> None:
    """Cover modules that were added to the tree since the pin was set: a backward may run them by themselves."""
    mark = _own(root)
    if mark is None:
        return
    harmless, waiting = mark.harmless, [root]
    while waiting:
        module = waiting.pop()
        if type(module) not in harmless and PIN not in module.__dict__:
            with _lock:
                _lay_out(root)
            return
        waiting += [child for child in module._modules.values() if child is not None]


refresh[OWN_PIN] = _refresh
adopt[OWN_PIN] = _add_root


def live_scope(scope: defaults.Scope) -> defaults.Scope:
    """Return the scope in force: without blocks that ended, with those of generators and compiled code."""
    return lifetime.in_force(scope)
