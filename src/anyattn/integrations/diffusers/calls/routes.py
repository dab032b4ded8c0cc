"""Models that Diffusers' own setter gave to anyattn: no backend is pinned, anyattn's settings decide.

A route is put in force as a pin is: by covering the root and what may compute attention inside it.
"""

from __future__ import annotations

import weakref
from typing import Final

from torch import nn

from anyattn.integrations.diffusers.calls import signatures
from anyattn.integrations.diffusers.install.watching import HOST, judged_in
from anyattn.pins import attending
from anyattn.pins.covering import OWN_ROUTE, ROUTE, Mark, adopt, cover, is_covered, live, refresh, uncover

_roots: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()


def add(module: nn.Module) -> None:
    """Route a module and all that is inside it."""
    mark = Mark(routed=True, host=HOST)
    mark.owner = weakref.ref(module)
    mark.judged = judged_in(module)
    module.__dict__[OWN_ROUTE] = mark
    _roots.add(module)
    _lay_out(module)
    signatures.cache(module)


def remove(module: nn.Module) -> bool:
    """Remove a route, from a module or from one inside it; return whether there was one."""
    found = False
    for part in module.modules():
        _roots.discard(part)
        own = part.__dict__.pop(OWN_ROUTE, None)
        if own is not None and own.owner() is part:
            own.clear()
        found = part.__dict__.pop(ROUTE, None) is not None or found
        uncover(part)
    for root in list(_roots):  # parts may belong to a root that stays
        _lay_out(root)
    return found


def remove_all() -> None:
    """Take every route back, those of copies too."""
    for root in list(_roots):
        remove(root)
    for mark in list(live):
        mark.routed = False


def _lay_out(root: nn.Module) -> None:
    mark = root.__dict__.get(OWN_ROUTE)
    if mark is None or not mark.routed:
        return
    for part in (root, *attending.modules(root)):
        part.__dict__[ROUTE] = mark
        cover(part)
    mark.harmless = frozenset(type(part) for part in root.modules() if not is_covered(part))


def _refresh(root: nn.Module) -> None:
    mark = root.__dict__.get(OWN_ROUTE)
    if mark is None or not mark.routed:
        return
    if any(ROUTE not in part.__dict__ and type(part) not in mark.harmless for part in root.modules()):
        _lay_out(root)


refresh[OWN_ROUTE] = _refresh
adopt[OWN_ROUTE] = _roots.add
