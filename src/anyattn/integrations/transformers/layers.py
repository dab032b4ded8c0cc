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

_CLASS = re.compile(r"^class ", re.MULTILINE)
_OWN = re.compile(r"\w*Attention\w*\((?:torch\.)?nn\.Module\):")

_MIXED = frozenset(("longt5", "inkling2"))
"""Models with layers of both kinds that were compared with eager attention, and are right."""


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


def reason_against_model(kind: type) -> str:
    """Return why a class of models can't have the name; empty if it can.

    A class is refused if no attention layer in its module looks anything up. It is also refused if some don't, and the
    class refuses `sdpa`: then those may read a mask as eager attention does, and a boolean one means another thing. A
    class whose source can't be had isn't judged.
    """
    module = sys.modules.get(kind.__module__)
    if module is None:
        return ""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return ""
    own = [block for block in _CLASS.split(source) if _OWN.match(block) and ASKS not in block]
    if own and ASKS not in source:
        return "it computes attention itself and never looks attn_implementation up, so it would change nothing"
    own = [block for block in own if "softmax" in block]  # others only hold a layer that computes it
    if own and not getattr(kind, "_supports_sdpa", False) and kind.__module__.split(".")[-2] not in _MIXED:
        names = ", ".join(block.partition("(")[0] for block in own)
        return f"{names} never look attn_implementation up, and may misread the masks of layers that do"
    return ""


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
