"""What a policy needs of plain modules: those that may compute attention, torch's own among them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Final

from torch import nn

from anyattn.pins import attending
from anyattn.pins.covering import CHOICE
from anyattn.sdpa import host, replacing

_WHOLE: Final = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""torch's own layers that a rule selects as one; an encoder layer's fast path is decided outside of its attention."""

_NESTED: Final = "use_nested_tensor"
_BEFORE: Final = "_anyattn_use_nested_tensor"
"""Where an encoder keeps what its `use_nested_tensor` was."""


class _Family:
    """Modules that belong to no host, as `anyattn.policy` uses them."""

    host = host.HOST

    def reach(self, root: nn.Module) -> tuple[list[tuple[nn.Module, str]], frozenset[type], Callable[[bool], None]]:
        """List the modules that may compute attention themselves.

        torch's encoders make nested tensors of padded batches, for the fast path only, which their layers leave out.
        """
        found: list[tuple[nn.Module, str]] = []
        _find(root, found)
        if not found:
            found = [(module, "") for module in attending.modules(root)]
        if not found and not type(root).__module__.startswith("torch."):
            found = [(root, "")]
        for module in root.modules() if found else ():
            if isinstance(module, nn.TransformerEncoder) and vars(module).get(_NESTED):
                vars(module)[_BEFORE], vars(module)[_NESTED] = vars(module)[_NESTED], False
        return found, host.JUDGED, functools.partial(_undo, weakref.ref(root))


def _find(module: nn.Module, found: list[tuple[nn.Module, str]]) -> None:
    if all(module is not known for known, _ in found):
        own = not type(module).__module__.startswith("torch.") and attending.may_attend(module)
        if isinstance(module, _WHOLE) or own:
            found.append((module, ""))
        if not isinstance(module, _WHOLE):
            for child in module.children():
                _find(child, found)


def _undo(reference: weakref.ref[nn.Module], unused: bool) -> None:
    """Put back what no policy needs any more: torch's function, and nested tensors."""
    replacing.settle()
    root = reference()
    for module in () if root is None else root.modules():
        if _BEFORE in vars(module) and not any(CHOICE in vars(part) for part in module.modules()):
            vars(module)[_NESTED] = vars(module).pop(_BEFORE)


FAMILY: Final = _Family()
