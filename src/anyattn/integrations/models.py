"""Choosing a backend for a model: by pins for any module, through the integration for Diffusers' own."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from anyattn.errors import InvalidCallError
from anyattn.pins import pins
from anyattn.types.decision import Precision


def _diffusers_of(model: Any) -> Any:
    """Give the Diffusers integration where the object is one of Diffusers', else None."""
    if "diffusers" not in sys.modules:
        return None
    from anyattn.integrations import diffusers

    return diffusers if diffusers.handles(model) else None


def set_attention_backend(
    model: Any, backend: str | list[str] | tuple[str, ...], *, precision: Precision = "exact"
) -> Any:
    """Choose the backend of one model or pipeline; no other model is touched.

    For a model or pipeline of Diffusers this also routes its attention through anyattn. For any other
    `torch.nn.Module` the choice is a pin: in force while the module's forward runs, for the calls of anyattn that are
    made inside it, unless a part of it has a pin of its own.

    Args:
        model: A `torch.nn.Module`, or a Diffusers pipeline.
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"`, `"fp8"` or `"fp4"`.

    Returns:
        For Diffusers a report of what was set, else None.

    Raises:
        UnknownBackendError: If a name is unknown.
        InvalidCallError: If the object isn't a module; for Diffusers also where nothing in it would change.
    """
    integration = _diffusers_of(model)
    if integration is not None:
        return integration.set_attention_backend(model, backend, precision=precision)
    if not isinstance(model, nn.Module):
        raise InvalidCallError(
            f"A backend is set on a torch.nn.Module or a Diffusers pipeline; {type(model).__name__} was given."
        )
    pins.pin(model, backend, precision=precision)
    return None


def reset_attention_backend(model: Any) -> None:
    """Undo `set_attention_backend` on one model or pipeline, and nothing else.

    Raises:
        InvalidCallError: If the object isn't a module or pipeline, or had no backend set.
    """
    integration = _diffusers_of(model)
    if integration is not None:
        integration.reset_attention_backend(model)
        return
    if not isinstance(model, nn.Module):
        raise InvalidCallError(
            f"A backend is reset on a torch.nn.Module or a Diffusers pipeline; {type(model).__name__} was given."
        )
    if not pins.unpin(model):
        raise InvalidCallError(f"This {type(model).__name__} has no backend of its own to reset.")
