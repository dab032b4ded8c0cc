"""Signatures of processors, cached while a model is pinned: Diffusers' layers compute them again at every call.

`Attention.forward` asks `inspect.signature(self.processor.__call__)` which arguments it may pass on (Diffusers 0.42.1,
`attention_processor.py` line 596). That takes about a fifth of a small attention layer's time on the host.
`inspect.signature` itself returns a function's `__signature__` if it has one, so nothing else changes.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import nn

_cached: dict[FunctionType, inspect.Signature] = {}


class _Signature(inspect.Signature):
    """A signature whose parameters are a plain dict: Dynamo reads no mapping proxy once a dict was changed."""

    __slots__ = ("_plain",)

    def __init__(self, signature: inspect.Signature) -> None:
        super().__init__(list(signature.parameters.values()), return_annotation=signature.return_annotation)
        self._plain = dict(signature.parameters)

    @property
    def parameters(self) -> Any:
        return self._plain

    def replace(self, **changes: Any) -> inspect.Signature:  # type: ignore[override]
        parameters = changes.get("parameters", tuple(self._plain.values()))
        annotation = changes.get("return_annotation", self.return_annotation)
        return inspect.Signature(parameters, return_annotation=annotation)


def cache(module: nn.Module) -> None:
    """Cache the signatures of the processors of a module and of everything inside it."""
    for part in module.modules():
        processor = getattr(part, "processor", None)
        if processor is not None:
            cache_kind(type(processor))


def cache_kind(kind: type) -> None:
    """Cache the signature of what instances of a class do when they are called."""
    function = getattr(kind, "__call__", None)  # noqa: B004 - the function itself is wanted
    if not isinstance(function, FunctionType):
        return
    if not hasattr(function, "__wrapped__") and not hasattr(function, "__signature__"):
        _cached[function] = function.__signature__ = _Signature(inspect.signature(function))  # type: ignore[attr-defined]


def forget() -> None:
    """Take every cached signature away again."""
    for function, signature in _cached.items():
        if getattr(function, "__signature__", None) is signature:
            del function.__signature__  # type: ignore[attr-defined]
    _cached.clear()
