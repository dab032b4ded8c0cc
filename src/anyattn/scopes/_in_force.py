"""The name of the scope in force, and what compiled code entered in this thread, as module attributes.

torch.compile refuses `ContextVar.get`, but reads a module's missing attribute through the module's `__getattr__`
and installs a guard that reads it again before each call: so a change of backend is followed, in every thread.
"""

from __future__ import annotations

from anyattn.scopes import defaults, lifetime

token: str
"""Names the scope in force in this thread or task."""

entered: list[defaults.Entered]
"""The pins and blocks that compiled code entered in this thread."""


def __getattr__(name: str) -> object:
    if name == "token":
        return lifetime.token()
    if name == "entered":
        return defaults.thread.entered
    raise AttributeError(name)
