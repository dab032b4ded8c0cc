"""Pin a backend to a model or a whole pipeline of Diffusers, and take the pin away exactly."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from anyattn.errors import AnyattnWarning, InvalidCallError
from anyattn.integrations.diffusers import state
from anyattn.integrations.diffusers.calls import signatures
from anyattn.integrations.diffusers.install.coverage import Layer, attention_layers
from anyattn.integrations.diffusers.install.sites import TEXT_ENCODER
from anyattn.integrations.diffusers.install.watching import HOST, judged_in
from anyattn.pins import pins
from anyattn.pins.covering import Host
from anyattn.selection.preferences import make_preference
from anyattn.types.decision import Precision, Preference
from anyattn.types.names import AUTO


@dataclass(frozen=True, slots=True)
class ComponentReport:
    """What setting a backend did to one component.

    Attributes:
        name: Its name in the pipeline; empty for a model given by itself.
        kind: Its class.
        pinned: Whether the backend is now pinned to it.
        layers: How many attention layers the pin reaches.
        left: The layers that it doesn't reach, each with the reason.
        reason: Why the component as a whole wasn't changed; empty if it was pinned.
    """

    name: str
    kind: str
    pinned: bool
    layers: int
    left: tuple[Layer, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        title = f"{self.name} ({self.kind})" if self.name else self.kind
        if not self.pinned:
            return f"{title}: not changed, {self.reason}"
        rest = f", {len(self.left)} more not reached: {_say_left(self.left)}" if self.left else ""
        return f"{title}: {self.layers} attention layers{rest}"


@dataclass(frozen=True, slots=True)
class SetReport:
    """What setting a backend did.

    Attributes:
        backend: What was asked for.
        components: Every component that was checked.
    """

    backend: str
    components: tuple[ComponentReport, ...]

    @property
    def pinned(self) -> tuple[str, ...]:
        """The names of the components that were pinned."""
        return tuple(component.name for component in self.components if component.pinned)

    def __str__(self) -> str:
        return "\n".join([f"backend {self.backend}:", *(f"  {component}" for component in self.components)])


class _Wishes:
    """The preferences for one module: its own, and those of the pipelines that it is part of, newest last."""

    def __init__(self, before: Preference | None) -> None:
        self.before = before
        self.own: Preference | None = None
        self.pipelines: list[tuple[weakref.ref[Any], Preference]] = []

    def set(self, module: nn.Module, target: Any, wish: Preference) -> None:
        """Record a preference set on the module itself or on a pipeline."""
        if target is module:
            self.own = wish
        else:
            self.pipelines = [entry for entry in self.pipelines if entry[0]() is not target]
            self.pipelines.append((weakref.ref(target), wish))

    def has(self, pipeline: Any) -> bool:
        """Whether a preference was set on a pipeline."""
        return any(entry[0]() is pipeline for entry in self.pipelines)

    def take(self, module: nn.Module, target: Any) -> bool:
        """Remove the preference set on `target`; return whether there was one."""
        if target is not module:
            left = [entry for entry in self.pipelines if entry[0]() is not target]
        elif self.own is not None:
            self.own = None
            return True
        else:  # a pipeline that is gone can't be reset any more, so resetting the model removes its preference
            left = [entry for entry in self.pipelines if entry[0]() is not None]
        found = len(left) < len(self.pipelines)
        self.pipelines = left
        return found

    @property
    def in_force(self) -> Preference | None:
        """The most specific preference."""
        if self.own is not None:
            return self.own
        return self.pipelines[-1][1] if self.pipelines else self.before

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left that was set here."""
        return self.own is None and not self.pipelines


_pinned: weakref.WeakKeyDictionary[nn.Module, _Wishes] = weakref.WeakKeyDictionary()


def handles(target: object) -> bool:
    """Whether `target` is a pipeline of Diffusers, or a module with a part of one of Diffusers' classes."""
    if "diffusers" not in sys.modules:
        return False
    if isinstance(target, nn.Module):
        return any(_of_diffusers(type(module)) for module in target.modules())
    return _is_pipeline(target)


def set_attention_backend(
    target: Any, backend: str | list[str] | tuple[str, ...], *, precision: Precision = "exact"
) -> SetReport:
    """Pin a backend to a model of Diffusers, or to every component of a pipeline that computes attention.

    Enables the integration. A model's own pin is more specific than its pipeline's, and beats it in either
    order. Text encoders and other models of Transformers aren't changed, and the report says so.

    Args:
        target: A pipeline, a model or a part of a model.
        backend: A name, an alias (all of Diffusers' names are), `"auto"`, or a list in order of preference.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"`, `"fp8"` or `"fp4"`.

    Returns:
        What was pinned and what wasn't, with reasons.

    Raises:
        InvalidCallError: If no attention layer would be reached; nothing is changed then.
        UnknownBackendError: If no backend has this name.
        UnsupportedVersionError: If this version of Diffusers isn't supported.
    """
    if not handles(target):
        raise InvalidCallError(f"Needed is a pipeline or model of Diffusers; {type(target).__name__} is neither.")
    target = _unwrapped(target)
    wish = make_preference(backend, "model", precision)
    with state.lock, ExitStack() as failed:
        if state.enable_implicitly():
            failed.callback(state.disable)
        components = list(components_of(target))
        reports = tuple(_inspect(name, module) for name, module in components)
        if not any(report.pinned for report in reports):
            details = "; ".join(str(report) for report in reports) or "it has no components that are modules"
            raise InvalidCallError(
                f"Setting {str(wish)!r} would change nothing: no attention layer of {type(target).__name__} "
                f"reaches anyattn ({details}). Nothing was changed."
            )
        for (_, module), report in zip(components, reports, strict=True):
            if report.pinned:
                _put(module, target, wish)
        failed.pop_all()
    _warn_of_left(reports)
    return SetReport(str(wish), reports)


def reset_attention_backend(target: Any) -> tuple[str, ...]:
    """Take away what `set_attention_backend` set on this very object, and nothing else.

    A preference that it had overruled (the pipeline's, by the model's own) is in force again. Once nothing is left
    of what `set_attention_backend` did, and `enable` was never called, the integration is disabled again.

    Returns:
        The names of the components that a pin was taken from.

    Raises:
        InvalidCallError: If nothing was set on this object.
    """
    target = _unwrapped(target)
    with state.lock:
        components = dict.fromkeys(module for _, module in components_of(target))
        names = {id(module): name for name, module in components_of(target)}
        # Components that were exchanged since the pin was set carry it still.
        components.update(dict.fromkeys(module for module, wishes in list(_pinned.items()) if wishes.has(target)))
        taken = tuple(names.get(id(module), type(module).__name__) for module in components if _take(module, target))
        if not taken:
            raise InvalidCallError(
                f"No backend was set on this {type(target).__name__}, so there is nothing to reset. A pin "
                "has to be taken from the object that it was set on: the pipeline or the model."
            )
        state.disable_if_implicit()
    return taken


def forget_all() -> None:
    """Take every pin away that was set here, and put back what was there before."""
    with state.lock:
        for module, wishes in list(_pinned.items()):
            _apply(module, wishes.before)
        _pinned.clear()
        pins.unpin_all(HOST)


state.at_disable.append(forget_all)
state.at_disable.append(signatures.forget)


def _put(module: nn.Module, target: Any, wish: Preference) -> None:
    wishes = _pinned.get(module)
    if wishes is None:
        before = pins.pin_of(module)
        # What is in force may come from an enclosing module, and is then not this module's to put back.
        # A copy of a pinned model has a pin that was set here; the new one replaces it.
        copied = pins.is_hosted(module, HOST)
        wishes = _pinned[module] = _Wishes(before if pins.unpin(module) and not copied else None)
    wishes.set(module, target, wish)
    _apply(module, wishes.in_force, HOST)
    signatures.cache(module)


def _take(module: nn.Module, target: Any) -> bool:
    wishes = _pinned.get(module)
    if wishes is None:  # pinned by hand, or a copy of a pinned model, alone or in a copied pipeline
        return (target is module or pins.is_hosted(module, HOST)) and pins.unpin(module)
    if not wishes.take(module, target):
        return False
    if wishes.is_empty:
        del _pinned[module]
    _apply(module, wishes.in_force, None if wishes.is_empty else HOST)
    return True


def _apply(module: nn.Module, wish: Preference | None, host: Host | None = None) -> None:
    if wish is None:
        pins.unpin(module)
    else:
        single = wish.mode == "require" or wish.names == (AUTO,)
        names = wish.names[0] if single else list(wish.names)
        pins.pin(module, names, precision=wish.precision, host=host, judged=judged_in(module))


def _warn_of_left(reports: tuple[ComponentReport, ...]) -> None:
    for report in reports:
        if any(layer.reason != TEXT_ENCODER for layer in report.left):
            warnings.warn(f"The backend doesn't reach every layer of {report}", AnyattnWarning, stacklevel=3)


def _inspect(name: str, module: nn.Module) -> ComponentReport:
    kind = type(module).__name__
    if not any(_of_diffusers(type(part)) for part in module.modules()):
        owner = type(module).__module__.partition(".")[0]
        reason = f"it belongs to {owner} and not to Diffusers; pin it by itself if you want that"
        return ComponentReport(name, kind, False, 0, (), reason)
    layers = attention_layers(module)
    reached = sum(layer.reached for layer in layers)
    left = tuple(layer for layer in layers if not layer.reached)
    if reached:
        return ComponentReport(name, kind, True, reached, left)
    reason = _say_left(left) if left else "it has no attention layers of Diffusers' own"
    return ComponentReport(name, kind, False, 0, left, reason)


def _say_left(left: tuple[Layer, ...]) -> str:
    kinds = {(layer.computed_by, layer.reason): 0 for layer in left}
    return "; ".join(f"{kind}: {reason}" for kind, reason in kinds)


def components_of(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a pipeline with their names; a model is its own, with an empty name."""
    if isinstance(target, nn.Module):
        yield "", target
        return
    components: Mapping[str, Any] = target.components
    for name, component in components.items():
        if isinstance(component, (list, tuple)):
            parts = [(f"{name}.{number}", part) for number, part in enumerate(component)]
        else:
            parts = [(name, component)]
        for label, part in parts:
            if isinstance(part, nn.Module):
                yield label, _unwrapped(part)


def _unwrapped(target: Any) -> Any:
    # torch.compile(model) gives a wrapper, whose own forward isn't the one that runs.
    return getattr(target, "_orig_mod", target)


def _is_pipeline(target: object) -> bool:
    return isinstance(getattr(target, "components", None), Mapping) and _of_diffusers(type(target))


def _of_diffusers(kind: type) -> bool:
    return any(base.__module__.startswith("diffusers.") for base in kind.__mro__)
