"""Turn the arguments of Diffusers' dispatcher into a call of anyattn, or refuse them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anyattn.errors import InvalidCallError
from anyattn.integrations.diffusers.calls.masks import translate
from anyattn.masks.objects import Bias, Boolean, SlidingWindow

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
"""Arguments that Diffusers takes both by name and in `attention_kwargs`, with their defaults."""

EXTRAS = ("return_lse", "softcap", "window", "sinks")
"""Keys of `attention_kwargs` that mean here what they mean in `anyattn.attention`."""

WINDOW = "window_size"
"""The key of `attention_kwargs` with flash-attn's meaning: `(left, right)`, the ends aligned."""

INSTEAD: dict[str, str] = {
    "return_attn_probs": "return_lse=True returns the log-sum-exp",
    "deterministic": "torch.use_deterministic_algorithms(True) asks for it",
    "backend": "name the backend with anyattn.set_attention_backend or anyattn.attention_backend",
    "_parallel_config": "parallel attention doesn't work through anyattn yet",
}


def to_call(
    query: Tensor,
    key: Tensor,
    explicit: dict[str, Any],
    attention_kwargs: dict[str, Any] | None,
    parallel_config: Any,
) -> dict[str, Any]:
    """Translate a call of Diffusers to the keyword arguments of `anyattn.attention`.

    Args:
        query: `(B, S_q, H, D)`.
        key: `(B, S_kv, H_kv, D)`.
        explicit: The arguments of `DEFAULTS`, as passed by name.
        attention_kwargs: Further arguments; every key is honoured or refused.
        parallel_config: Diffusers' context-parallel configuration.

    Raises:
        InvalidCallError: If a key is unknown or passed twice with two values, if the mask is ambiguous, or if
            context parallelism is asked for.
    """
    if parallel_config is not None:
        raise InvalidCallError(
            "Context parallelism doesn't work through anyattn yet: each rank would attend only to its own shard. Leave "
            "out enable_parallelism, or run this model without anyattn: anyattn.reset_attention_backend(model)."
        )
    call = dict(explicit)
    window = None
    if attention_kwargs:
        window = _merge(call, attention_kwargs)
    call["attn_mask"] = translate(call["attn_mask"], query, key)
    if window is not None:
        _add_window(call, window, query, key)
    return call


def _merge(call: dict[str, Any], attention_kwargs: dict[str, Any]) -> Any:
    """Put every key of `attention_kwargs` into the call, except flash-attn's window, which is returned."""
    window = None
    for name, value in attention_kwargs.items():
        if name in DEFAULTS:
            call[name] = _one_value(name, call[name], value)
        elif name in EXTRAS:
            call[name] = value
        elif name == WINDOW:
            window = value
        else:
            known = ", ".join((*DEFAULTS, *EXTRAS, WINDOW))
            hint = f" Instead: {INSTEAD[name]}." if name in INSTEAD else ""
            raise InvalidCallError(
                f"attention_kwargs has the key {name!r}, which isn't an argument; known: {known}.{hint}"
            )
    return window


def _one_value(name: str, explicit: Any, value: Any) -> Any:
    default = DEFAULTS[name]
    if value is default or value is explicit:
        return explicit
    if explicit is default or (name != "attn_mask" and explicit in (default, value)):
        return value
    raise InvalidCallError(
        f"{name} is passed twice: by name and, with another value, in attention_kwargs. Pass it once."
    )


def _add_window(call: dict[str, Any], window: Any, query: Tensor, key: Tensor) -> None:
    if "window" in call:
        raise InvalidCallError("attention_kwargs has both window and window_size. Pass one of them.")
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise InvalidCallError(f"window_size must be (left, right), -1 = unbounded; {window!r} was given.")
    left, right = window
    if (left, right) == (-1, -1):
        return
    if query.shape[1] == key.shape[1]:
        # If the lengths are equal, both alignments are the same mask, so it can be joined with is_causal.
        call["window"] = (left, right)
        return
    if call["is_causal"]:
        raise InvalidCallError(
            "window_size aligns the last query with the last key, as flash-attn does, and is_causal the first query "
            f"with the first key, as torch does; with {query.shape[1]} queries and {key.shape[1]} keys they can't be "
            "joined. Pass one dense mask that holds both."
        )
    mask = call["attn_mask"]
    if isinstance(mask, torch.Tensor):
        mask = Boolean(mask) if mask.dtype == torch.bool else Bias(mask)
    pattern = SlidingWindow(left, right, "lower_right")
    call["attn_mask"] = pattern if mask is None else mask & pattern
