"""From a name to a backend, lazily; third parties join through the entry-point group `anyattn.backends`."""

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
from anyattn.types.decision import Preference
from anyattn.types.names import AUTO, BY_NAME, KNOWN, canonical, nearest
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
"""Each built backend and the class that implements it: one line adds one."""

_added: dict[str, Backend] = {}
_substitutes: dict[str, Backend] = {}


def names() -> tuple[str, ...]:
    """Give every known canonical name: the plan's, then those of third parties."""
    return (*built_in_names(), *third_parties())


def built_in_names() -> tuple[str, ...]:
    """Give the plan's canonical names; looking at one imports no third party's package."""
    return tuple(known.name for known in KNOWN)


@functools.lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    import importlib.metadata

    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points if point.name not in BY_NAME}


def third_parties() -> tuple[str, ...]:
    """Give the names that other packages or `register` brought."""
    return tuple(dict.fromkeys((*_entry_points(), *_added)))


def register(backend: Backend) -> None:
    """Add a backend at run time; for packages, an entry point in `anyattn.backends` is better.

    Raises:
        ValueError: If a built-in backend has the name.
    """
    if not backend.name or backend.name in BY_NAME or backend.name == AUTO:
        raise ValueError(f"The name {backend.name!r} is empty or taken by a backend of anyattn itself.")
    _added[backend.name] = backend
    defaults.forget()


def unregister(name: str) -> None:
    """Take back what `register` added."""
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
            raise TypeError(f"{type(backend).__name__} is no anyattn.backend.Backend")
        if backend.name != name:
            raise TypeError(f"the backend calls itself {backend.name!r}, its entry point {name!r}")
    except Exception as error:  # noqa: BLE001 - a third party's package fails in whatever way it likes
        return _Broken(name, error)
    return backend


class _Broken(Backend):
    """Stands for a third party's backend that can't be imported: every call is refused with the reason."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name  # type: ignore[misc]
        self.error = error

    def availability(self, env: Environment) -> Iterator[Reason]:
        point = _entry_points()[self.name]
        got = f"{type(self.error).__name__}: {self.error}"
        package = point.dist.name if point.dist is not None else "the package that announces it"
        yield Reason("broken_import", f"an importable {point.value}", got, f"mend or uninstall {package}")

    def reasons(self, spec: AttentionSpec, env: Environment) -> tuple[Reason, ...]:
        return tuple(self.availability(env))


def get(name: str) -> Backend | None:
    """Give a backend by its canonical name; None where it is known but not built in this release."""
    if name in _substitutes:
        return _substitutes[name]
    if name in _added:
        return _added[name]
    if name in BUILTIN:
        return _import(BUILTIN[name])
    if name in _entry_points():
        return _from_entry_point(name)
    return None


def not_built(name: str) -> Reason:
    """Say why a known backend without an adapter can't run."""
    known = BY_NAME[name]
    hint = f"it will need: {known.install}" if known.install else ""
    return Reason("not_built", f"an adapter for {name} ({known.needs})", "none in this release of anyattn", hint)


def resolve_name(name: object) -> str:
    """Turn a name or alias into the canonical name.

    Raises:
        UnknownBackendError: If nothing has the name; the message gives the nearest that exist.
        TypeError: If it isn't a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"A backend is named by a string, not {type(name).__name__}.")
    extra = third_parties()
    found = canonical(name, extra)
    if found is None:
        close = nearest(name, extra)
        guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UnknownBackendError(
            f"There is no attention backend {name!r}.{guess} The names are: {', '.join((AUTO, *names()))}."
        )
    return found


def resolve_preference(wish: Preference) -> Preference:
    """Make every name of a preference canonical.

    Raises:
        UnknownBackendError: If one is unknown; where it came from an environment variable, that is said.
    """
    try:
        found = tuple(dict.fromkeys(resolve_name(name) for name in wish.names))
    except UnknownBackendError as error:
        if wish.source.isupper():
            raise UnknownBackendError(f"The environment variable {wish.source} can't be followed. {error}") from None
        raise
    mode = "prefer" if found == (AUTO,) else wish.mode
    return Preference(found, mode, wish.source, wish.precision)


def known(wanted: Iterable[str]) -> list[tuple[str, Backend | None]]:
    """Give the backends for some canonical names, None for those without an adapter."""
    return [(name, get(name)) for name in wanted]


def given() -> dict[str, Backend]:
    """Return the backends that `register` added or `substituted` put in place of others, as they are now."""
    return {**_added, **_substitutes}
