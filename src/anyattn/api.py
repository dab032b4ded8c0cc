"""The public calls: attention, and its drop-in for torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from anyattn.backend.protocol import Output
from anyattn.call.facts import Options
from anyattn.call.keys import place_key, tensor_name
from anyattn.pins.pins import live_scope
from anyattn.run.attempts import run_after, run_any, run_decided
from anyattn.run.traced import traced_call
from anyattn.scopes import defaults, lifetime
from anyattn.selection.faults import is_kernels
from anyattn.selection.preferences import Backends, scope_of_call

_current = defaults.current.get
_thread = defaults.thread
_held = lifetime.held
_tracing = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
# True where any device's autocast is on; one call instead of one per device type.
_autocast_on = torch._C._is_any_autocast_enabled


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backends | None = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backends | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    backend: Backends | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backends | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute scaled dot-product attention in the (batch, sequence, heads, head_dim) layout.

    Args:
        query: `(B, S_q, H, D)`, floating-point.
        key: `(B, S_kv, H_kv, D)`, of query's dtype and device.
        value: `(B, S_kv, H_kv, D_v)`, of query's dtype and device.
        attn_mask: A tensor that broadcasts to `(B, H, S_q, S_kv)` (bool: True = attend; float32 or query's
            dtype: added to the scaled scores), an object of `anyattn.masks`, or a FlexAttention BlockMask.
            A 2-D tensor is `(S_q, S_kv)`; padding `(B, S_kv)` is `masks.KeyPadding`. Joined with
            `is_causal` and `window`: a position is allowed where all allow it.
        dropout_p: Probability in [0, 1] with which a weight is dropped; applied whenever it isn't 0.
        is_causal: Upper-left causal: row i attends to columns `j <= i`. For the other alignment use
            `masks.Causal("lower_right")`.
        scale: What scores are multiplied by; None is `1 / sqrt(D)`. Zero and negative are valid.
        enable_gqa: Whether `H` may be a multiple of `H_kv`: query head h reads head `h // (H // H_kv)`.
        window: `(left, right)`: how many columns before and after its own position a row sees, -1 for
            unbounded; aligned like the causal mask in force, upper-left without one.
        softcap: Scores become `softcap * tanh(score / softcap)`, after the scale and before a bias.
        sinks: `(H,)`, extra logits in the softmax's denominator.
        return_lse: Whether to give the log-sum-exp too.
        backend: A name, an alias, `"auto"` or a list in order of preference, for this call alone.

    Returns:
        `(B, S_q, H, D_v)` in query's dtype; with `return_lse=True` a pair of it and the natural log-sum-exp
        of the scaled, masked scores: float32 `(B, H, S_q)`, detached. A row without any allowed key gives
        zeros and -inf.

    Raises:
        InvalidCallError: If the call is wrong for any backend.
        UnknownBackendError: If a backend's name is unknown.
        BackendUnavailableError: If the backend required isn't to be had here.
        UnsupportedCallError: If no backend that may run admits the call; it carries the decision.
        KernelError: If the kernel raises.
        InvalidSettingError: If an environment variable has an invalid value.
        TypeError: For an unknown keyword, or a backend that is no string.

    While torch.compile traces, these arrive inside an error of torch._dynamo, which holds their words; the checks that
    read values aren't made there.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 8, 2, 16)
        >>> anyattn.attention(q, k, v, is_causal=True).shape
        torch.Size([1, 8, 2, 16])
    """
    if _tracing():
        options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
        return traced_call(query, key, value, attn_mask, sinks, options, backend)
    scope = _current()
    if scope.look or _thread.entered or _held:
        scope = live_scope(scope)
    if backend is not None:
        scope = scope_of_call(scope, backend)
    if sinks is None:
        try:
            call: Callable[..., Output] = scope.short[
                attn_mask
                if attn_mask is None
                else tensor_name(attn_mask)
                if type(attn_mask) is Tensor
                else attn_mask.short,
                query.shape,
                key.shape,
                value.shape,
                query.dtype,
                query.is_cpu or place_key(query, key, value),
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                window,
                softcap,
                return_lse,
            ]
        except (KeyError, TypeError, AttributeError, RuntimeError):
            pass  # not decided yet, or wrong: described below, with an error that says why
        else:
            try:
                return call(query, key, value) if attn_mask is None else call(query, key, value, attn_mask)
            except Exception as error:
                if not is_kernels(error):
                    raise
                plain = (dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
                return run_after(error, scope, query, key, value, attn_mask, plain)
    plain = (dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
    return run_any(scope, query, key, value, attn_mask, sinks, plain)


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backends | None = ...,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backends | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    window: tuple[int, int] | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool,
    backend: Backends | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backends | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention in torch's own (batch, heads, sequence, head_dim) layout: a drop-in for SDPA.

    The arguments and errors are those of `attention`; only the layout of query, key, value and the output
    differs. Unlike torch's, it takes four dimensions exactly, and a batch or head of 1 isn't broadcast.

    Returns:
        `(B, H, S_q, D_v)`; with `return_lse=True` a pair of it and the log-sum-exp `(B, H, S_q)`.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> out = anyattn.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
        True
    """
    if _tracing():
        options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BHSD")
        return traced_call(query, key, value, attn_mask, sinks, options, backend)
    scope = _current()
    if scope.look or _thread.entered or _held:
        scope = live_scope(scope)
    if backend is not None:
        scope = scope_of_call(scope, backend)
    plain = (dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BHSD")
    if sinks is None:
        found = run_decided(scope, query, key, value, attn_mask, plain)
        if found is not None:
            return found
    return run_any(scope, query, key, value, attn_mask, sinks, plain)
