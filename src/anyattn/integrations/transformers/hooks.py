"""Refusals where Transformers would accept the name silently: models that never call it, and unknown sub-configs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from anyattn.errors import InvalidCallError
from anyattn.integrations.transformers import layers
from anyattn.integrations.transformers.calls import masks
from anyattn.integrations.transformers.versions import NAME


def install(undo: ExitStack) -> None:
    """Wrap the two functions of every model by which it gets its implementation."""
    checked = PreTrainedModel.get_correct_attn_implementation
    setter = PreTrainedModel.set_attn_implementation
    _replace("get_correct_attn_implementation", _checked(checked), undo)
    _replace("set_attn_implementation", _setter(setter), undo)


def _replace(name: str, function: Callable[..., Any], undo: ExitStack) -> None:
    before = vars(PreTrainedModel)[name]

    def put_back() -> None:
        if vars(PreTrainedModel)[name] is function:
            setattr(PreTrainedModel, name, before)

    undo.callback(put_back)
    setattr(PreTrainedModel, name, function)


def _checked(stock: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(stock)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        found = stock(self, requested_attention, is_init_check)
        if found == NAME:
            admit(self)
        return found

    return get_correct_attn_implementation


def _setter(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def set_attn_implementation(
        self: Any, attn_implementation: str | dict[str, Any], allow_all_kernels: bool = False
    ) -> None:
        own = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if own == NAME:
            admit(self)
        if isinstance(attn_implementation, dict):
            _refuse_unknown(self.config, attn_implementation)
        stock(self, attn_implementation, allow_all_kernels)

    return set_attn_implementation


def admit(model: Any) -> None:
    """Check that a model can have the name, and note whether its layers say whether they are causal.

    Raises:
        InvalidCallError: If it can't.
    """
    reason = layers.reason_against_model(type(model))
    if reason:
        raise InvalidCallError(
            f"{type(model).__name__} can't have attn_implementation={NAME!r}: {reason}. Leave attn_implementation out, "
            "or, in a model of several parts, give a dict that names the other sub-configs: "
            f"attn_implementation={{'text_config': {NAME!r}}}."
        )
    if getattr(model, "_supports_sdpa", False):
        masks.trusted.add(model.config.model_type)


def _refuse_unknown(config: Any, wanted: dict[str, Any]) -> None:
    """Refuse a dict with the name under a key that is no sub-config; Transformers ignores it."""
    for key, value in wanted.items():
        if isinstance(value, dict) and key in config.sub_configs:
            part = getattr(config, key, None)
            if part is not None:
                _refuse_unknown(part, value)
        elif key and key not in config.sub_configs and _names_it(value):
            known = ", ".join(repr(name) for name in config.sub_configs) or "none"
            raise InvalidCallError(
                f"{type(config).__name__} has no sub-config {key!r}, so {NAME!r} would be set nowhere. It has: "
                f"{known}; '' is the model itself."
            )


def _names_it(value: Any) -> bool:
    return value == NAME or (isinstance(value, dict) and any(_names_it(inner) for inner in value.values()))
