"""The name of the scope in force, as a module attribute.

torch.compile refuses `ContextVar.get`, but reads a module's missing attribute through the module's `__getattr__`
and installs a guard that reads it again before each call: so a change of backend is followed, in every thread.
"""

from __future__ import annotations

from anyattn import policy


def __getattr__(name: str) -> str:
    if name == "token":
        return policy.token()
    raise AttributeError(name)
