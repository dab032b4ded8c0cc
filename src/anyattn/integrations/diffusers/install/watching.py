"""Pins and routes after they were set: copies, pickles, and processors that are exchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from anyattn.errors import AnyattnWarning
from anyattn.integrations.diffusers.calls import signatures
from anyattn.integrations.diffusers.install import coverage
from anyattn.integrations.diffusers.versions import UnsupportedVersionError
from anyattn.pins.covering import Mark, active

enablers: Final[list[Callable[[], bool]]] = []
"""The function that enables the integration; the module that defines it adds it."""


class _Host:
    """The integration's callbacks for its marks; one object, pickled by its name."""

    def __reduce__(self) -> str:
        return "HOST"

    def arrived(self, mark: Mark) -> None:
        """Enable the integration for a copied or unpickled mark; if that fails, clear the mark and warn."""
        try:
            for enable in enablers:
                enable()
        except UnsupportedVersionError as error:
            warnings.warn(
                f"This model ran through anyattn ({mark}) when it was saved, and doesn't here: {error}",
                AnyattnWarning,
                stacklevel=2,
            )
            mark.clear()

    def watch(self, layer: nn.Module, mark: Mark) -> None:
        """Warn, once a class, before a layer runs with a new processor that doesn't reach anyattn."""
        kind = type(_processor_of(layer))
        if kind in mark.judged:
            return
        mark.judged |= {kind}
        signatures.cache_kind(kind)
        reason = reason_against(kind)
        if reason:
            _warn(type(layer).__name__, kind, reason)

    def watch_traced(self, kind: type) -> None:
        """Warn while torch.compile traces."""
        _judge_traced(kind)

    def reaches(self, layer: nn.Module) -> bool:
        """Whether the layer's processor, if it has one, reaches anyattn."""
        return not reason_against(type(_processor_of(layer)))


HOST: Final = _Host()


def is_needed() -> bool:
    """Whether any pin or route of the integration is still held by a module."""
    return any(mark.host is HOST for mark in active())


def judged_in(module: nn.Module) -> frozenset[type]:
    """Return the classes of the processors that a model has now; its report covers them."""
    return frozenset(type(_processor_of(part)) for part in module.modules()) | {type(None)}


def reason_against(kind: type) -> str:
    """Return why a processor's attention doesn't reach anyattn; empty if it does, or if it computes none."""
    if kind is type(None):
        return ""
    reason = coverage.reason_of(kind)
    if reason is None and not kind.__module__.startswith("diffusers."):
        return "its code calls neither Diffusers' dispatcher nor torch's function from a module of Diffusers"
    return reason or ""


def _processor_of(layer: nn.Module) -> Any:
    found = layer.__dict__.get("processor")
    return layer._modules.get("processor") if found is None else found


def _judge_traced(kind: type) -> bool:
    reason = reason_against(kind)
    if reason:
        _warn("A layer", kind, reason)
    return True


# See `anyattn.run.traced`: the function runs while tracing.
_judge_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn(layer: str, kind: type, reason: str) -> None:
    warnings.warn(
        f"A backend was set on this model, and then {layer} got the processor {kind.__qualname__}, which anyattn "
        f"doesn't reach: {reason}. Its attention runs without the backend until another processor is set.",
        AnyattnWarning,
        stacklevel=3,
    )
