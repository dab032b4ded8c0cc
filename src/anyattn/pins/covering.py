"""Put a backend in force while a module runs, by changing the module's class to a subclass of it.

A covered module has the class `type(module.__name__, (_Covered, type(module)), {})`, whose `__call__` enters the scope
and leaves it in a `finally`. It needs no hook: nothing stays in force after Ctrl-C, copies and replicas are covered
themselves, hooks and wrapped forwards that others add run inside it, and torch.compile sees one class for all modules
of a class.
"""

from __future__ import annotations

import copyreg
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from anyattn.errors import AnyattnError, BackendUnavailableError, UnsupportedCallError
from anyattn.scopes import _in_force, defaults
from anyattn.types.decision import Preference

PIN = "_anyattn_pin_in_force"
ROUTE = "_anyattn_route_in_force"
OWN_PIN = "_anyattn_pin"
OWN_ROUTE = "_anyattn_route"
CHOICE = "_anyattn_choice"
KEYS = (PIN, ROUTE, OWN_PIN, OWN_ROUTE, CHOICE)

_current = defaults.current.get
_tracing = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled


class Host(Protocol):
    """What an integration does for the marks that it set; pickled by its name."""

    def arrived(self, mark: Mark) -> None:
        """Make a copied or unpickled mark work, or clear it."""

    def watch(self, layer: nn.Module, mark: Mark) -> None:
        """Check, before a layer runs, whether its attention still reaches anyattn."""

    def watch_traced(self, kind: type) -> None:
        """Check the same for the class of a layer's processor, while torch.compile traces."""

    def reaches(self, layer: nn.Module) -> bool:
        """Whether a layer's attention reaches anyattn."""


class Mark:
    """A pin or route of a tree of modules; its root and every covered module inside hold the same object.

    Attributes:
        preference: The backend pinned; None for a route, or after the pin was removed.
        routed: Whether Diffusers' own setter routed the tree to anyattn.
        owner: A weak reference to the root; it returns None for a copy whose root wasn't copied.
        host: The integration that set it.
        judged: The classes of processors that the host has checked.
        harmless: The classes of modules that need no covering.
    """

    __slots__ = ("__weakref__", "harmless", "host", "judged", "owner", "preference", "routed")

    def __init__(self, preference: Preference | None = None, routed: bool = False, host: Host | None = None) -> None:
        self.preference = preference
        self.routed = routed
        self.host = host
        self.owner: Callable[[], nn.Module | None] = _nobody
        self.judged: frozenset[type] = frozenset()
        self.harmless: frozenset[type] = frozenset()
        live.add(self)

    @property
    def active(self) -> bool:
        """Whether it still pins or routes."""
        return self.preference is not None or self.routed

    def wishes(self) -> tuple[Preference, ...]:
        """Return every preference that it may put in force."""
        return () if self.preference is None else (self.preference,)

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(map(str, self.wishes()))) or "its settings decide"

    def clear(self) -> None:
        """Remove the pin and route, in every copy that shares this object."""
        self.preference, self.routed = None, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        made = _restored(self.preference, self.routed, self.host)
        made.judged, made.harmless = self.judged, self.harmless
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.preference, self.routed, self.host)


live: weakref.WeakSet[Mark] = weakref.WeakSet()
"""Every mark that some module still holds."""


def active() -> list[Mark]:
    """Return the marks that still pin, route or choose."""
    return [mark for mark in list(live) if mark.active]


refresh: dict[str, Callable[[nn.Module], None]] = {}
"""For each kind of own mark, the function that covers modules added to its tree."""

adopt: dict[str, Callable[[nn.Module], None]] = {}
"""For each kind of own mark, the function to call with a root that was copied or unpickled."""


def _nobody() -> None:
    return None


def _restored(preference: Preference | None, routed: bool, host: Host | None) -> Mark:
    mark = Mark(preference, routed, host)
    if host is not None and mark.active:
        host.arrived(mark)
    return mark


class _Covered(nn.Module):
    """The first base of a covered module's class.

    It is a module since Python lets an object's class be changed only to one with the same memory layout.
    """

    # Set in the instance's dictionary if the module has one.
    _anyattn_pin_in_force: Mark | None = None
    _anyattn_route_in_force: Mark | None = None
    _anyattn_pin: Mark | None = None
    _anyattn_route: Mark | None = None
    _anyattn_choice: Mark | None = None
    _anyattn_direct = False
    """Whether the module's own class has torch's `__call__`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Don't run what the module's class does to its subclasses (registries, checks) for a covered class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pin, route, choice = self._anyattn_pin_in_force, self._anyattn_route_in_force, self._anyattn_choice
        if _tracing():
            entered = _entered_by(self, pin, route, choice)
            for one in entered:
                _in_force.entered.append(one)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                for _ in entered:
                    _in_force.entered.pop()
        wish = None if pin is None else pin.preference
        if choice is not None and (chosen := choice.preference) is not None:
            pin, wish = choice, chosen
        before = inner = _current()
        processor = self.__dict__.get("processor")
        if processor is None:
            processor = self._modules.get("processor")
        if route is not None and route.routed:
            inner = defaults.inside(inner, None)
            if type(processor) not in route.judged and route.host is not None:
                route.host.watch(self, route)
        if pin is not None and wish is not None:
            if inner.settings.pin is not wish:
                inner = defaults.inside(inner, wish)
            if type(processor) not in pin.judged and pin.host is not None:
                pin.host.watch(self, pin)
        if _grad_enabled():
            if self._anyattn_pin is not None:
                refresh[OWN_PIN](self)
            if self._anyattn_route is not None:
                refresh[OWN_ROUTE](self)
        try:
            # Inside the `try`, so Ctrl-C can't come between. Mostly the pinned model around this module has already put
            # the scope in force.
            if inner is not before:
                defaults.current.set(inner)
            if self._anyattn_direct and self._compiled_call_impl is None:
                # The same as nn.Module.__call__, with one function call less (torch 2.8 to 2.14).
                return self._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
            return super().__call__(*args, **kwargs)
        except AnyattnError as error:
            _name_layer(error, self, pin, wish)
            raise
        finally:
            if inner is not before:
                defaults.leave(before, inner)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for key, adopt_root in adopt.items():
            mark = self.__dict__.get(key)
            if mark is not None:
                if mark.owner() is None:
                    mark.owner = weakref.ref(self)
                adopt_root(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the module's own class, which can be imported, instead of the covered class, which can't."""
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if not isinstance(reduced, tuple):
            return reduced
        make, args, *rest = reduced
        here = type(self)
        if make in (copyreg.__newobj__, copyreg.__newobj_ex__) and args[0] is here:  # type: ignore[attr-defined]
            return (_made_anew, (make, origin_of(here), *args[1:]), *rest)
        return (make, args, *rest)


def _made_anew(make: Any, kind: type, *args: Any) -> Any:
    return make(_subclass_of(kind), *args)


def _entered_by(module: Any, pin: Mark | None, route: Mark | None, choice: Any) -> list[defaults.Entered]:
    """Return what a covered module enters, as plain constants that are the same for every module of one root."""
    found = []
    host = None
    if route is not None and route.routed:
        found.append(defaults.ROUTE)
        host = route.host
    wish = None if pin is None else pin.preference
    if choice is not None and (chosen := choice.traced()) is not None:
        pin, wish = choice, chosen
    if pin is not None and wish is not None:
        found.append(defaults.plain("pin", wish))
        host = pin.host if pin.host is not None else host
    if host is not None:
        processor = getattr(module, "processor", None)
        if processor is not None:
            host.watch_traced(type(processor))
    return found


def _name_layer(error: AnyattnError, module: nn.Module, pin: Mark | None, wish: Preference | None) -> None:
    """Add to a refusal which layer of the pinned model made the call: the innermost covered module."""
    if pin is None or wish is None or not isinstance(error, (BackendUnavailableError, UnsupportedCallError)):
        return
    decision = getattr(error, "decision", None)
    # The pin isn't what was refused if the call named a backend itself, or a block overrode the pin.
    if decision is not None:
        of_pin = decision.preference == wish
    else:
        of_pin = getattr(error, "backend", "") in wish.names
    if not of_pin or "_anyattn_layer" in error.__dict__:
        return
    root = pin.owner()
    name = None if root is None else next((name for name, part in root.named_modules() if part is module), None)
    of = "" if root is None or name is None else f" of {type(root).__name__}"
    where = f"{name or 'the model itself'} ({type(module).__name__}){of}"
    error.__dict__["_anyattn_layer"] = where
    text = f"{error.args[0]}\nThe layer that made the call: {where}."
    error.args = (text, *error.args[1:])
    if isinstance(error, BackendUnavailableError):
        error.msg = text


_subclasses: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()
# Strong references: a pin that is set again gets the same class, which compiled code guards on by identity.
_kept: deque[type] = deque(maxlen=256)


def _subclass_of(kind: type) -> type:
    """Return the covered class of a class; always the same object."""
    known = _subclasses.get(kind)
    found = None if known is None else known()
    if found is None:
        names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        names["__doc__"] = kind.__doc__
        names["_anyattn_direct"] = kind.__call__ is nn.Module.__call__
        found = type(kind)(kind.__name__, (_Covered, kind), names)
        _subclasses[kind] = weakref.ref(found)
        _kept.append(found)
    return found


def origin_of(kind: type) -> type:
    """Return a covered module's own class."""
    return kind.__mro__[kind.__mro__.index(_Covered) + 1]


def is_covered(module: nn.Module) -> bool:
    """Whether a module's class honours the marks in its dictionary."""
    return isinstance(module, _Covered)


def cover(module: nn.Module) -> None:
    """Change a module's class, so that it honours the marks in its dictionary."""
    if not isinstance(module, _Covered):
        module.__class__ = _subclass_of(type(module))


def uncover(module: nn.Module) -> None:
    """Restore a module's own class, if no mark is left on it."""
    if isinstance(module, _Covered) and not any(key in module.__dict__ for key in KEYS):
        kind = type(module)
        # Another library may have put a class of its own on top; then the covered class stays below and does nothing.
        if _subclasses.get(kind.__mro__[2], _nobody)() is kind:
            module.__class__ = origin_of(kind)
