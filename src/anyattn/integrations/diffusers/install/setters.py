"""Diffusers' own setters, extended by the name anyattn; every other name goes to Diffusers as before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from anyattn.errors import AnyattnWarning, InvalidCallError
from anyattn.integrations.diffusers.calls import routes
from anyattn.integrations.diffusers.install import coverage, patches
from anyattn.integrations.diffusers.versions import BACKEND_NAME, load
from anyattn.pins.covering import CHOICE, PIN


class _Nothing:
    """The placeholder for a layer without a processor."""


_NOTHING = _Nothing()


def install(undo: ExitStack) -> None:
    """Replace the setters of models and of attention layers.

    Diffusers' own setter would write the name to the processors that have an attribute for it, skip all others
    silently, and switch every other model of the process too (modeling_utils.py 0.42.1, lines 654-668).
    """
    model = load("models.modeling_utils").ModelMixin
    layer = load("models.attention").AttentionModuleMixin
    undo.callback(routes.remove_all)
    patches.replace(model, "set_attention_backend", _setter(model.set_attention_backend), undo)
    patches.replace(model, "reset_attention_backend", _resetter(model.reset_attention_backend), undo)
    patches.replace(layer, "set_attention_backend", _setter(layer.set_attention_backend), undo)


def _setter(stock: Callable[..., None]) -> Callable[..., None]:
    def set_attention_backend(self: Any, backend: str) -> None:
        """Set a backend by its name in Diffusers; "anyattn" leaves the choice to anyattn's settings."""
        if backend.lower() == BACKEND_NAME:
            _route(self)
            return
        stock(self, backend)
        routes.remove(self)
        _warn_of_pins(self, backend)

    set_attention_backend.__doc__ = f"{stock.__doc__ or ''}\n\n{set_attention_backend.__doc__}"
    return set_attention_backend


def _warn_of_pins(module: nn.Module, backend: str) -> None:
    """Warn if layers stay on the backend that anyattn pinned: a pin is more specific than Diffusers' setting."""
    marks = [vars(part).get(key) for part in module.modules() for key in (PIN, CHOICE)]
    pinned = sorted({str(wish) for mark in marks if mark is not None for wish in mark.wishes()})
    if pinned:
        warnings.warn(
            f"{type(module).__name__}.set_attention_backend({backend!r}) waits: anyattn pinned layers of it to "
            f"{'; '.join(pinned)}, where they run until anyattn.reset_attention_backend(...).",
            AnyattnWarning,
            stacklevel=3,
        )


def _resetter(stock: Callable[..., None]) -> Callable[..., None]:
    def reset_attention_backend(self: Any) -> None:
        stock(self)
        routes.remove(self)

    reset_attention_backend.__doc__ = stock.__doc__
    return reset_attention_backend


def _route(module: nn.Module) -> None:
    layers = coverage.attention_layers(module)
    if not any(layer.reached for layer in layers):
        why = "; ".join(sorted({f"{layer.computed_by}: {layer.reason}" for layer in layers}))
        raise InvalidCallError(
            f"set_attention_backend({BACKEND_NAME!r}) would change nothing: no attention layer of "
            f"{type(module).__name__} reaches anyattn ({why or 'it has none'})."
        )
    for part in module.modules():
        # A backend that Diffusers' setter wrote to a processor before would still be used; this call replaces it.
        vars(getattr(part, "processor", None) or _NOTHING).pop("_attention_backend", None)
    routes.add(module)
