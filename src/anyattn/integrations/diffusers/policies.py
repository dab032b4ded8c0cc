"""What a policy needs of Diffusers: a pipeline's components, and a model's attention layers within reach."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from torch import nn

from anyattn.integrations.diffusers import models, schedules, state
from anyattn.integrations.diffusers.calls import signatures
from anyattn.integrations.diffusers.install import coverage
from anyattn.integrations.diffusers.install.watching import HOST, judged_in
from anyattn.pins import choices


class _Family:
    """Models of Diffusers, as `anyattn.policy` uses them."""

    host = HOST

    def reach(self, root: nn.Module) -> tuple[list[tuple[nn.Module, str]], frozenset[type], Callable[[bool], None]]:
        """Enable the integration, and list a model's attention layers.

        Raises:
            UnsupportedVersionError: If this version of Diffusers isn't supported; nothing is changed then.
        """
        with state.lock, ExitStack() as failed:
            state.enable_implicitly()
            failed.callback(state.disable_if_implicit)
            found = [(root.get_submodule(layer.path), layer.reason) for layer in coverage.attention_layers(root)]
            signatures.cache(root)
            failed.pop_all()
        return found, judged_in(root), _undo


def _undo(unused: bool) -> None:
    """Disable the integration, if only setters had enabled it and nothing is left of what they set."""
    state.disable_if_implicit()


FAMILY: Final = _Family()


def components(target: Any) -> list[tuple[str, nn.Module]]:
    """Return the modules of a pipeline with their names; a model is its own, with an empty name."""
    return list(models.components_of(target))


def forget_all() -> None:
    """Take off every policy from models of Diffusers."""
    choices.remove_all(HOST)
    schedules.leave_all()


state.at_disable.append(forget_all)
