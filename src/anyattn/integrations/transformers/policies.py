"""What a policy needs of Transformers: a model's attention layers within reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import nn

from anyattn.errors import InvalidCallError
from anyattn.integrations.transformers import layers, models, state
from anyattn.integrations.transformers.versions import UnsupportedVersionError
from anyattn.integrations.transformers.watching import HOST
from anyattn.pins import choices


class _Family:
    """Models of Transformers, as `anyattn.policy` uses them."""

    host = HOST

    def reach(self, root: nn.Module) -> tuple[list[tuple[nn.Module, str]], frozenset[type], Callable[[bool], None]]:
        """Switch a model to `"anyattn"`, and list its attention layers; where that can't be, they have the reason."""
        why = ""
        undo: Callable[[bool], None] = _nothing
        try:
            undo = models.switch(root)
        except (UnsupportedVersionError, InvalidCallError) as error:
            why = str(error)
        found = [(root.get_submodule(layer.path), why or layer.reason) for layer in layers.attention_layers(root)]
        return found, frozenset(), undo


def _nothing(unused: bool) -> None:
    """Undo nothing."""


FAMILY: Final = _Family()


def forget_all() -> None:
    """Take off every policy from models of Transformers."""
    choices.remove_all(HOST)


state.at_disable.append(forget_all)
