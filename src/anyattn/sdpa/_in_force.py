"""Whether torch's function is replaced at this point, as a module attribute that torch.compile can guard on.

See `anyattn.scopes._in_force`.
"""

from __future__ import annotations

from anyattn.scopes import lifetime

asked: bool
"""Whether a `replace_sdpa` block or a pin is in force."""


def __getattr__(name: str) -> bool:
    if name != "asked":
        raise AttributeError(name)
    settings = lifetime.settings()
    return settings.sdpa or settings.pin is not None
