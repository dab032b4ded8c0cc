"""The backends by name, imported when needed; third parties use the entry-point group `anyattn.backends`.

Looking up a canonical name imports one adapter at most. Aliases and distributions import every adapter; they are read
only for names that aren't canonical, and for reports.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from anyattn.backend.protocol import Backend
from anyattn.environment import Environment
from anyattn.errors import UnknownBackendError
from anyattn.scopes import defaults
from anyattn.sources.packages import Package
from anyattn.types.decision import Preference
from anyattn.types.names import AUTO, nearest, spellings
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "anyattn.backends"

BUILTIN: dict[str, str] = {
    "native": "anyattn.adapters.native:Native",
    "native_flash": "anyattn.adapters.native:NativeFlash",
    "native_efficient": "anyattn.adapters.native:NativeEfficient",
    "native_cudnn": "anyattn.adapters.native:NativeCudnn",
    "native_math": "anyattn.adapters.native:NativeMath",
    "flex": "anyattn.adapters.flex:Flex",
    "flash2": "anyattn.adapters.flash2:Flash2",
    "flash3": "anyattn.adapters.flash3:Flash3",
    "flash3_fp8": "anyattn.adapters.flash3:Flash3Fp8",
    "flash4": "anyattn.adapters.flash4:Flash4",
    "ffpa": "anyattn.adapters.ffpa:Ffpa",
    "xformers": "anyattn.adapters.xformers:XFormers",
    "sage": "anyattn.adapters.sage:Sage",
    "sage_int8_fp16": "anyattn.adapters.sage:SageInt8Fp16",
    "sage_int8_fp16_triton": "anyattn.adapters.sage:SageInt8Fp16Triton",
    "sage_int8_fp8": "anyattn.adapters.sage:SageInt8Fp8",
    "sage_int8_fp8_sm90": "anyattn.adapters.sage:SageInt8Fp8Sm90",
    "aiter": "anyattn.adapters.aiter:Aiter",
    "xla": "anyattn.adapters.xla:Xla",
    "npu": "anyattn.adapters.npu:Npu",
    "flash2_hub": "anyattn.adapters.flash2:Flash2Hub",
    "flash3_hub": "anyattn.adapters.flash3:Flash3Hub",
    "flash4_hub": "anyattn.adapters.flash4:Flash4Hub",
    "sage_hub": "anyattn.adapters.sage:SageHub",
    "sage_blackwell_hub": "anyattn.adapters.sage_blackwell:SageBlackwellHub",
    "aiter_hub": "anyattn.adapters.aiter:AiterHub",
}
"""Each of anyattn's own backends and its class; one line adds a backend."""

_added: dict[str, Backend] = {}
_substitutes: dict[str, Backend] = {}


def names() -> tuple[str, ...]:
    """Return every canonical name: anyattn's own, then those of third parties."""
    return (*built_in_names(), *third_parties())


def built_in_names() -> tuple[str, ...]:
    """Return the canonical names of anyattn's own backends."""
    return tuple(BUILTIN)


@functools.lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    import importlib.metadata

    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points if point.name not in BUILTIN}


def third_parties() -> tuple[str, ...]:
    """Return the names added by other packages and by `register`."""
    return tuple(dict.fromkeys((*_entry_points(), *_added)))


def register(backend: Backend) -> None:
    """Add a backend at run time; for packages, an entry point in `anyattn.backends` is better.

    Raises:
        ValueError: If the name is empty or belongs to anyattn itself.
    """
    if not backend.name or backend.name in BUILTIN or backend.name == AUTO:
        raise ValueError(f"The name {backend.name!r} is empty or one of anyattn's own; give the backend another name.")
    _added[backend.name] = backend
    defaults.forget()


def unregister(name: str) -> None:
    """Remove a backend that `register` added."""
    _added.pop(name, None)
    defaults.forget()


@contextlib.contextmanager
def substituted(backend: Backend) -> Iterator[None]:
    """Have a built-in name stand for another backend inside the block, in every thread: for contract doubles."""
    before = _substitutes.get(backend.name)
    _substitutes[backend.name] = backend
    defaults.forget()
    try:
        yield
    finally:
        if before is None:
            del _substitutes[backend.name]
        else:
            _substitutes[backend.name] = before
        defaults.forget()


@functools.lru_cache(maxsize=256)
def _import(target: str) -> Backend:
    module, _, attribute = target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


@functools.lru_cache(maxsize=256)
def _from_entry_point(name: str) -> Backend:
    try:
        found = _entry_points()[name].load()
        backend: Backend = found() if isinstance(found, type) else found
        if not isinstance(backend, Backend):
            raise TypeError(f"{type(backend).__name__} isn't an anyattn.backend.Backend")
        if backend.name != name:
            raise TypeError(f"the backend's name is {backend.name!r}, its entry point's {name!r}")
    except Exception as error:  # noqa: BLE001 - a third party's package may raise anything
        return _Broken(name, error)
    return backend


class _Broken(Backend):
    """A third party's backend that can't be imported; it refuses every call with the reason."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name  # type: ignore[misc]
        self.error = error

    def availability(self, env: Environment) -> Iterator[Reason]:
        point = _entry_points()[self.name]
        got = f"{type(self.error).__name__}: {self.error}"
        package = point.dist.name if point.dist is not None else "the package with this entry point"
        yield Reason("broken_import", f"an importable {point.value}", got, f"reinstall or uninstall {package}")

    def reasons(self, spec: AttentionSpec, env: Environment) -> tuple[Reason, ...]:
        return tuple(self.availability(env))


def get(name: str) -> Backend:
    """Return a backend by its canonical name.

    Raises:
        UnknownBackendError: If no backend has the name; aliases aren't looked up.
    """
    if name in _substitutes:
        return _substitutes[name]
    if name in _added:
        return _added[name]
    if name in BUILTIN:
        return _import(BUILTIN[name])
    if name in _entry_points():
        return _from_entry_point(name)
    raise _unknown(name)


def known(wanted: Iterable[str]) -> list[tuple[str, Backend]]:
    """Return backends by canonical name, each with its name."""
    return [(name, get(name)) for name in wanted]


def aliases(wanted: Iterable[str]) -> dict[str, str]:
    """Return the canonical name by alias, of some backends; if two share an alias, the first has it."""
    found: dict[str, str] = {}
    for name, backend in known(wanted):
        for alias in backend.aliases:
            found.setdefault(spellings(alias)[1], name)
    return found


def packages() -> tuple[Package, ...]:
    """Return the packages of anyattn's own backends."""
    return tuple(dict.fromkeys(package for _, backend in known(BUILTIN) for package in backend.packages))


def distributions() -> tuple[str, ...]:
    """Return the distributions that a choice among anyattn's own backends depends on."""
    names = {name for package in packages() for name in (package.distribution, *package.others) if name}
    return tuple(sorted(names))


def modules() -> tuple[str, ...]:
    """Return the modules whose presence a choice among anyattn's own backends depends on."""
    return tuple(sorted({package.found_by for package in packages() if package.found_by}))


def canonical(name: str) -> str | None:
    """Return the canonical name of a name or alias; None if it is unknown.

    Third parties' packages are imported only if no name and no alias of anyattn's own matches.
    """
    others = third_parties()
    for spelled in spellings(name):
        if spelled == AUTO or spelled in BUILTIN or spelled in others:
            return spelled
    if name in others:
        return name
    alias = spellings(name)[1]
    return aliases(BUILTIN).get(alias) or aliases(others).get(alias)


def like(name: str) -> list[str]:
    """Return the names and aliases most similar to a misspelt one, the likeliest first."""
    return nearest(name, (AUTO, *names(), *aliases(names())))


def _unknown(name: str) -> UnknownBackendError:
    close = like(name)
    guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return UnknownBackendError(
        f"There is no attention backend {name!r}.{guess} The names are: {', '.join((AUTO, *names()))}."
    )


def resolve_name(name: object) -> str:
    """Return the canonical name of a name or alias.

    Raises:
        UnknownBackendError: If it is unknown; the message lists similar names.
        TypeError: If it isn't a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"A backend's name must be a string; {type(name).__name__} was given.")
    found = canonical(name)
    if found is None:
        raise _unknown(name)
    return found


def resolve_preference(wish: Preference) -> Preference:
    """Make every name of a preference canonical.

    Raises:
        UnknownBackendError: If one is unknown; the message says so if it came from an environment variable.
    """
    try:
        found = tuple(dict.fromkeys(resolve_name(name) for name in wish.names))
    except UnknownBackendError as error:
        if wish.source.isupper():
            raise UnknownBackendError(f"The environment variable {wish.source} is invalid. {error}") from None
        raise
    mode = "prefer" if found == (AUTO,) else wish.mode
    return Preference(found, mode, wish.source, wish.precision)


def given() -> dict[str, Backend]:
    """Return the backends that `register` added or `substituted` replaced, as they are now."""
    return {**_added, **_substitutes}
