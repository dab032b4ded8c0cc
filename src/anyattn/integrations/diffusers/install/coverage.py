"""Find the attention layers of a model, and whether the attention of each reaches anyattn."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from anyattn.integrations.diffusers.calls import doors
from anyattn.integrations.diffusers.install.patches import DISPATCH
from anyattn.integrations.diffusers.install.sites import OWN_KERNELS, OWN_LAYERS
from anyattn.pins.attending import names_of

SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer of a model.

    Attributes:
        path: Its name inside the model.
        computed_by: The class whose code computes the attention: the layer's own, or its processor's.
        reason: Why anyattn doesn't reach it; empty if it does.
    """

    path: str
    computed_by: str
    reason: str = ""

    @property
    def reached(self) -> bool:
        """Whether anyattn can run it."""
        return not self.reason


def attention_layers(model: nn.Module) -> list[Layer]:
    """List the layers of a model that compute softmax attention, by reading their code.

    The integration must be enabled: a layer is reached if its code calls one of the functions of `calls.doors`.
    """
    known: dict[type, str | None] = {}
    layers = []
    for path, module in model.named_modules():
        if path.endswith(".processor"):  # counted with the layer that it belongs to
            continue
        for computing in (module, getattr(module, "processor", None)):
            if computing is None:
                continue
            kind = type(computing)
            if kind not in known:
                known[kind] = reason_of(kind)
            reason = known[kind]
            if reason is not None:
                layers.append(Layer(path, kind.__qualname__, reason))
                break
    return layers


def reason_of(kind: type) -> str | None:
    """Return why a class isn't reached; an empty text if it is, None if it computes no attention."""
    for base in kind.__mro__:
        own = OWN_LAYERS.get(f"{base.__module__}:{base.__qualname__}")
        if own is not None:
            return own
    has_forward = issubclass(kind, nn.Module) and kind.forward is not nn.Module.forward
    start = getattr(kind, "forward" if has_forward else "__call__", None)
    reached = False
    reasons: list[str] = []
    for function in _called(start, kind):
        names = names_of(function)
        reached = reached or _opens_a_door(function, names)
        reasons += [OWN_KERNELS[name] for name in OWN_KERNELS if name in names]
        if SDPA in names and not _opens_a_door(function, names):
            reasons.append("its module calls torch's function, and isn't one of Diffusers'")
        if DISPATCH in names and not _opens_a_door(function, names):
            reasons.append("its module holds another dispatcher than Diffusers' own")
    if reasons:
        return reasons[0]
    return "" if reached else None


def _opens_a_door(function: FunctionType, names: set[str]) -> bool:
    found = function.__globals__
    # If it isn't a global, the function imports it or reads it from Diffusers' module, which holds the replacement.
    if DISPATCH in names and found.get(DISPATCH, doors.dispatch_attention_fn) is doors.dispatch_attention_fn:
        return True
    proxies = doors.PROXIES
    return SDPA in names and any(alias in names and found.get(alias) is proxies[alias] for alias in proxies)


def _called(start: Any, kind: type) -> Iterator[FunctionType]:
    """Walk the functions that `start` may call: methods of its class, and functions that its module names."""
    waiting, seen = [start], set()
    while waiting:
        function = waiting.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        yield function
        for name in names_of(function):
            for found in (function.__globals__.get(name), inspect.getattr_static(kind, name, None)):
                if isinstance(found, (FunctionType, staticmethod, classmethod)) and _is_local(found):
                    waiting.append(found)


def _is_local(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return not module.startswith(("torch.", "anyattn.")) and module != "torch"
