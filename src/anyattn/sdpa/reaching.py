"""What a policy needs of plain modules: those that may compute attention, torch's own among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from anyattn.pins import attending
from anyattn.sdpa import host, replacing

_WHOLE: Final = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""torch's own layers that a rule selects as one; an encoder layer's fast path is decided outside of its attention."""


class _Family:
    """Modules that belong to no host, as `anyattn.policy` uses them."""

    host = host.HOST

    def reach(self, root: nn.Module) -> tuple[list[tuple[nn.Module, str]], frozenset[type], Callable[[bool], None]]:
        """List the modules that may compute attention themselves."""
        found: list[tuple[nn.Module, str]] = []
        _find(root, found)
        inside = found or [(module, "") for module in attending.modules(root)] or [(root, "")]
        return inside, host.JUDGED, _undo


def _find(module: nn.Module, found: list[tuple[nn.Module, str]]) -> None:
    if all(module is not known for known, _ in found):
        own = not type(module).__module__.startswith("torch.") and attending.may_attend(module)
        if isinstance(module, _WHOLE) or own:
            found.append((module, ""))
        if not isinstance(module, _WHOLE):
            for child in module.children():
                _find(child, found)


def _undo(unused: bool) -> None:
    """Put torch's function back, if nothing needs its replacement any more."""
    replacing.settle()


FAMILY: Final = _Family()
