"""The preference of a single call: what is passed as `backend=`."""

from __future__ import annotations

from typing import Any

from anyattn.errors import InvalidCallError
from anyattn.process.bounded import Bounded
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.types.decision import Precision, Preference
from anyattn.types.names import AUTO

Backends = str | list[str] | tuple[str, ...]
"""A name, an alias, `"auto"`, or a list in order of preference."""


_preferences: Bounded[Any, Preference] = Bounded(1024)


def scope_of_call(scope: defaults.Scope, backend: Any) -> defaults.Scope:
    """Return the scope in which a call with `backend=` runs; it beats blocks and pins.

    Raises:
        UnknownBackendError: If a name is unknown.
        TypeError: If it is neither a name nor a list of names.
    """
    if isinstance(backend, list):
        backend = tuple(backend)
    calls = scope.base.calls
    found: defaults.Scope | None = calls.get(backend)
    if found is None or scope.recorder is not None:
        wish = make_preference(backend, "backend=", scope.settings.precision)
        found = defaults.changed(scope, context=wish, override=True)
        # Third parties' names aren't cached: they can be unregistered.
        if scope.recorder is None and all(name in registry.BUILTIN or name == AUTO for name in wish.names):
            calls[backend] = found
    return found


def make_preference(backend: Any, source: str, precision: Precision = "exact") -> Preference:
    """Convert a name or a list of names to a preference with canonical names.

    Raises:
        UnknownBackendError: If a name is unknown.
        TypeError: If it is neither a name nor a list of names.
        InvalidCallError: If the list is empty, or the precision isn't one.
    """
    if type(backend) is str:
        known = _preferences.get((backend, source, precision))
        if known is not None:
            return known
    if precision not in ("exact", "int8", "fp8", "fp4"):
        raise InvalidCallError(f"precision must be 'exact', 'int8', 'fp8' or 'fp4'; {precision!r} was given.")
    if not isinstance(backend, str | list | tuple):
        raise TypeError(f"backend must be a name or a list of names; {type(backend).__name__} was given.")
    key = (tuple(backend) if isinstance(backend, list) else backend, source, precision)
    found = _preferences.get(key)
    if found is None:
        is_list = isinstance(backend, list | tuple)
        names = tuple(backend) if is_list else (backend,)
        if not names:
            raise InvalidCallError("backend must name at least one backend; an empty list was given.")
        resolved = tuple(registry.resolve_name(name) for name in names)
        found = defaults.preference(resolved, is_list=is_list, source=source, precision=precision)
        if all(name in registry.BUILTIN or name == AUTO for name in resolved):
            _preferences[key] = found
    return found
