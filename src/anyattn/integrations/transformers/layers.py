"""Which modules of a model compute attention, and which of them ask Transformers for the function to call."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from anyattn.integrations.transformers.versions import NAME
from anyattn.pins import attending
from anyattn.pins.covering import is_covered, origin_of

ASKS = "ALL_ATTENTION_FUNCTIONS"
"""The name that an attention layer's code mentions if it looks its implementation up."""

_OWN = re.compile(r"^class \w*Attention\w*\((?:torch\.)?nn\.Module\):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer of a model.

    Attributes:
        path: Its name inside the model.
        kind: Its class.
        implementation: What its config says, if it looks that up; else empty.
        reason: Why its attention doesn't reach anyattn; empty if it does.
    """

    path: str
    kind: str
    implementation: str
    reason: str = ""

    @property
    def reached(self) -> bool:
        """Whether its attention goes through anyattn."""
        return not self.reason


def never_asks(kind: type) -> bool:
    """Whether a class of models is written in a module with attention layers none of which look anything up.

    A class whose source can't be had isn't judged.
    """
    module = sys.modules.get(kind.__module__)
    if module is None:
        return False
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return bool(_OWN.search(source)) and ASKS not in source


def attention_layers(model: nn.Module) -> tuple[Layer, ...]:
    """List the attention layers of a model."""
    return tuple(layer for path, part in model.named_modules() if (layer := _layer(path, part)) is not None)


def asks(module: nn.Module) -> bool:
    """Whether a module's own forward looks its implementation up."""
    forward = inspect.unwrap(_kind(module).forward)
    return ASKS in attending.names_of(forward) if inspect.isfunction(forward) else False


def reason_against(module: nn.Module) -> str:
    """Return why a module that looks its implementation up doesn't reach anyattn; empty if it does."""
    found = implementation_of(module)
    return "" if found == NAME else f"its attn_implementation is {found!r}"


def implementation_of(module: nn.Module) -> str:
    """Return what a module's config says, or an empty string."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or ""


def _layer(path: str, module: nn.Module) -> Layer | None:
    kind = _kind(module)
    if asks(module):
        return Layer(path, kind.__name__, implementation_of(module), reason_against(module))
    own = "Attention" in kind.__name__ and not any("Attention" in type(part).__name__ for part in _inside(module))
    if own and any(True for _ in module.parameters()):
        return Layer(path, kind.__name__, "", "it computes attention itself and never looks attn_implementation up")
    return None


def _inside(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if part is not module]


def _kind(module: nn.Module) -> type[Any]:
    return origin_of(type(module)) if is_covered(module) else type(module)
