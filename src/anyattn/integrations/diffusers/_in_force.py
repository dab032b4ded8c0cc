"""Whether anyattn was asked for at this point, as a module attribute that torch.compile can guard on.

torch.compile refuses `ContextVar.get`, but reads a missing attribute of a module through the module's
`__getattr__` and reads it again before each call; see `anyattn._in_force`.
"""

from __future__ import annotations

from anyattn import lifetime
from anyattn.integrations.diffusers import routes

wish: str
"""`"override"`, `"pin"`, `"context"`, `"route"` (Diffusers' own setter chose anyattn), or empty."""


def __getattr__(name: str) -> str:
    if name != "wish":
        raise AttributeError(name)
    settings = lifetime.settings()
    if settings.context is not None and settings.override:
        return "override"
    if settings.pin is not None:
        return "pin"
    if settings.context is not None:
        return "context"
    return "route" if routes.running() else ""
