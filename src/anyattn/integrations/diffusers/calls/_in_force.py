"""Whether anyattn was asked for at this point, as a module attribute that torch.compile can guard on.

torch.compile refuses `ContextVar.get`, but reads a missing attribute of a module through the module's
`__getattr__` and reads it again before each call; see `anyattn.scopes._in_force`.
"""

from __future__ import annotations

from anyattn.scopes import defaults, lifetime

wish: str
"""`"override"`, `"pin"`, `"context"`, `"route"` (Diffusers' own setter chose anyattn), or empty."""


def wish_of(settings: defaults.Settings) -> str:
    """Return the kind of preference that decides under some settings."""
    if settings.context is not None and settings.override:
        return "override"
    if settings.pin is not None:
        return "pin"
    if settings.context is not None:
        return "context"
    return "route" if settings.routed else ""


def __getattr__(name: str) -> str:
    if name != "wish":
        raise AttributeError(name)
    return wish_of(lifetime.settings())
