"""Pin a backend to a model of Transformers, and take the pin away exactly."""

from __future__ import annotations

import importlib
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from anyattn.errors import AnyattnWarning, InvalidCallError
from anyattn.integrations.transformers import layers, state
from anyattn.integrations.transformers.layers import Layer
from anyattn.integrations.transformers.versions import NAME
from anyattn.integrations.transformers.watching import HOST
from anyattn.pins import pins
from anyattn.pins.covering import active, is_covered, origin_of
from anyattn.selection.preferences import make_preference
from anyattn.types.decision import Precision
from anyattn.types.names import AUTO


@dataclass(frozen=True, slots=True)
class SetReport:
    """What setting a backend did to a model of Transformers.

    Attributes:
        backend: What was asked for.
        kind: The model's class.
        layers: How many attention layers the pin reaches.
        switched: The implementations that were replaced by "anyattn"; empty if all layers had it.
        left: The layers that aren't reached, each with the reason.
    """

    backend: str
    kind: str
    layers: int
    switched: tuple[str, ...] = ()
    left: tuple[Layer, ...] = ()

    def __str__(self) -> str:
        text = f"backend {self.backend}: {self.kind}: {self.layers} attention layers"
        if self.switched:
            text += f", switched from attn_implementation {' and '.join(map(repr, self.switched))} to {NAME!r}"
        if self.left:
            text += f", {len(self.left)} more not reached: {_say(self.left)}"
        return text


@dataclass(eq=False, slots=True)
class _Record:
    """What was changed for one pinned module: the configs that its layers read, and what those said before."""

    configs: list[Any]
    before: list[tuple[Any, str]] = field(default_factory=list)


_records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()


def handles(target: object) -> bool:
    """Whether a module contains a model of Transformers, or a layer that looks its implementation up there."""
    if "transformers" not in sys.modules or not isinstance(target, nn.Module):
        return False
    return any(_is_model(part) or layers.asks(part) for part in target.modules())


def set_attention_backend(
    target: nn.Module, backend: str | list[str] | tuple[str, ...], *, precision: Precision = "exact"
) -> SetReport:
    """Pin a backend to a model of Transformers, or a part of one.

    Enables the integration. A model with another `attn_implementation` is switched to `"anyattn"`, which the report
    says and `reset_attention_backend` undoes.

    Args:
        target: A model, a module that contains models, or a part of a model that runs with `"anyattn"` already.
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        precision: The loosest precision that lists and `auto` may use.

    Returns:
        What was pinned and what wasn't, with reasons.

    Raises:
        InvalidCallError: If no attention layer would be reached; nothing is changed then.
        UnknownBackendError: If no backend has this name.
        UnsupportedVersionError: If this version of Transformers isn't supported.
    """
    if not handles(target):
        raise InvalidCallError(f"Needed is a model of Transformers; {type(target).__name__} is none.")
    target = getattr(target, "_orig_mod", target)
    wish = make_preference(backend, "model", precision)
    with state.lock, ExitStack() as failed:
        record = _switched(target, failed)
        found = layers.attention_layers(target)
        left = tuple(layer for layer in found if not layer.reached)
        reached = len(found) - len(left)
        if not reached:
            why = (_say(left) or "it has none that looks attn_implementation up") + _why_not(target)
            raise InvalidCallError(
                f"Setting {str(wish)!r} would change nothing: no attention layer of {type(target).__name__} reaches "
                f"anyattn ({why}). Nothing was changed. For a part of a model, first call "
                f"model.set_attn_implementation({NAME!r}) on the whole model."
            )
        single = wish.mode == "require" or wish.names == (AUTO,)
        pins.pin(target, wish.names[0] if single else list(wish.names), precision=wish.precision, host=HOST)
        failed.pop_all()
        known = _records.get(target)
        if known is not None:
            record.before = known.before + record.before
        _records[target] = record
    switched = tuple(dict.fromkeys(str(before) for _, before in record.before))
    report = SetReport(str(wish), type(target).__name__, reached, switched, left)
    if left:
        warnings.warn(f"The backend doesn't reach every layer: {report}", AnyattnWarning, stacklevel=2)
    return report


def reset_attention_backend(target: nn.Module) -> None:
    """Take away what `set_attention_backend` set on this very object, and put its implementation back.

    A copy of a pinned model loses its pin, and keeps `"anyattn"` as its implementation.

    Raises:
        InvalidCallError: If nothing was set on this object.
    """
    target = getattr(target, "_orig_mod", target)
    with state.lock:
        if not pins.unpin(target):
            raise InvalidCallError(f"This {type(target).__name__} has no backend of its own to reset.")
        record = _records.pop(target, None)
        if record is not None:
            _hand_on(record)


def switch(target: nn.Module) -> Callable[[bool], None]:
    """Switch a model to `"anyattn"` for a policy.

    Returns:
        The function that puts its implementation back. Called with True, because nothing was set on the model after
        all, it also disables the integration, if this call had enabled it and nothing else uses it.

    Raises:
        InvalidCallError: If Transformers' own layers would misread the masks.
        UnsupportedVersionError: If this version of Transformers isn't supported. In both cases nothing is changed.
    """
    with state.lock, ExitStack() as failed:
        was_enabled = state.is_enabled()
        key = _ForPolicy()
        _records[key] = _switched(target, failed)
        failed.pop_all()

    def undo(unused: bool) -> None:
        with state.lock:
            record = _records.pop(key, None)
            if record is not None:
                _hand_on(record)
            if unused and not was_enabled and not _records and not any(mark.host is HOST for mark in active()):
                state.disable()

    return undo


class _ForPolicy:
    """Stands in `_records` for one policy on one model."""


def _switched(target: nn.Module, failed: ExitStack) -> _Record:
    """Enable the integration and give a model's configs the name; `failed` undoes both."""
    if not state.is_enabled():
        state.enable()
        failed.callback(state.disable)
    record = _Record(_configs(target))
    hooks = importlib.import_module("anyattn.integrations.transformers.hooks")
    failed.callback(_put_back, record.before)
    for config in record.configs:
        owner = _owner(target, config)
        if config._attn_implementation != NAME and owner is not None and not _refused(owner):
            hooks.admit(owner)
            record.before.append((config, config._attn_implementation))
            config._attn_implementation_internal = NAME
    return record


def forget_all() -> None:
    """Take every pin away that was set here, and put every implementation back."""
    with state.lock:
        records = list(_records.values())
        _records.clear()
        pins.unpin_all(HOST)
        for record in records:
            _put_back(record.before)


state.at_disable.append(forget_all)


def _hand_on(record: _Record) -> None:
    """Put back what configs said, except for those that another pinned module reads; that one puts them back later."""
    own = []
    for config, before in record.before:
        heir = next((other for other in _records.values() if any(config is one for one in other.configs)), None)
        if heir is None:
            own.append((config, before))
        else:
            heir.before.append((config, before))
    _put_back(own)


def _put_back(before: list[tuple[Any, str]]) -> None:
    for config, implementation in reversed(before):
        # One that the user has set since is kept.
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = implementation


def _configs(target: nn.Module) -> list[Any]:
    """Return the configs by which the layers of a module choose a function, and its models make masks."""
    found: list[Any] = []
    asking = [part for part in target.modules() if layers.asks(part)]
    models = [part for part in target.modules() if _is_model(part) and any(layers.asks(p) for p in part.modules())]
    for part in (*asking, *models):
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and not any(config is one for one in found):
            found.append(config)
    return found


def _owner(target: nn.Module, config: Any) -> nn.Module | None:
    """Return the model that a config belongs to, which makes the masks of its layers; None if it isn't inside."""
    owners = (part for part in target.modules() if _is_model(part) and getattr(part, "config", None) is config)
    return next(owners, None)


def _refused(model: nn.Module) -> str:
    kind = type(model)
    return layers.reason_against_model(origin_of(kind) if is_covered(model) else kind)


def _is_model(module: nn.Module) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _why_not(target: nn.Module) -> str:
    reasons = dict.fromkeys(
        f"; {type(part).__name__}: {_refused(part)}" for part in target.modules() if _is_model(part) and _refused(part)
    )
    return "".join(reasons)


def _say(left: tuple[Layer, ...]) -> str:
    return "; ".join(dict.fromkeys(f"{layer.kind}: {layer.reason}" for layer in left))
