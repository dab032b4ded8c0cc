"""The public calls: attention, and its drop-in for torch's SDPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from anyattn.call.arguments import autocast_dtype, bias_is_aligned
from anyattn.call.facts import Options, plain_options
from anyattn.call.keys import place_key, tensor_name
from anyattn.masks.objects import Mask
from anyattn.masks.values import known_of, known_of_tensor
from anyattn.pins.pins import live_scope
from anyattn.process import tracing
from anyattn.process.tracing import is_plain, is_usual
from anyattn.run.plan import raise_kernel_error
from anyattn.run.table import Entry, entry_for, explain_failure
from anyattn.run.traced import traced_call
from anyattn.run.transformed import call_under
from anyattn.scopes import defaults, lifetime
from anyattn.selection.faults import is_kernels, passes_over
from anyattn.selection.preferences import Backends, scope_of_call

_current = defaults.current.get
_thread = defaults.thread
_held = lifetime.held
_tracing = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
# True where any device's autocast is on; one call instead of one per device type.
_autocast_on = torch._C._is_any_autocast_enabled


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
) -> Any:
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
        InvalidSettingError: If an environment variable holds what can't be followed.
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
            call = scope.short[
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
                options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
                explain_failure(error, scope, query, key, value, attn_mask, options)
    plain = (dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
    return _general(scope, query, key, value, attn_mask, sinks, plain)


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
) -> Any:
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
    return _general(scope, query, key, value, attn_mask, sinks, plain)


def run_decided(
    scope: defaults.Scope, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, plain: tuple[Any, ...]
) -> Any:
    """Run a call in the (batch, heads, sequence, head_dim) layout that is in the short table; None where it isn't.

    Args:
        scope: The scope in force.
        query: `(B, H, S_q, D)`; key and value likewise, as in `scaled_dot_product_attention`.
        key: `(B, H_kv, S_kv, D)`.
        value: `(B, H_kv, S_kv, D_v)`.
        attn_mask: As there.
        plain: The fields of `Options`, in their order.
    """
    try:
        call = scope.short[
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
            plain,
        ]
    except (KeyError, TypeError, AttributeError, RuntimeError):
        return None  # not decided yet, or wrong: described elsewhere, with an error that says why
    try:
        return call(query, key, value) if attn_mask is None else call(query, key, value, attn_mask)
    except Exception as error:
        if not is_kernels(error):
            raise
        explain_failure(error, scope, query, key, value, attn_mask, Options(*plain))
        return None


def _general(
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    plain: tuple[Any, ...],
) -> Any:
    """Run any call: find it in the table by everything that its decision depends on, or decide it."""
    mode = None if type(query) is Tensor else tracing.mode_left(query)
    if mode is not None:
        with mode:
            return _general(scope, query, key, value, attn_mask, sinks, plain)
    table_key: Any = None
    if type(plain[4]) is list:
        plain = (*plain[:4], tuple(plain[4]), *plain[5:])
    try:
        table_key = _table_key(query, key, value, attn_mask, sinks, plain)
        entry = scope.table.get(table_key)
        if entry is not None and not entry.in_graphs and tracing.is_captured(query):
            table_key = entry = None
    except (TypeError, AttributeError, RuntimeError):
        # Not tensors, symbolic sizes, or an unhashable option: described anew, and refused where it is wrong.
        table_key = entry = None
    # SDPA itself, without a mask, is what it is under every tracer and transform; all else is decided anew there.
    if (entry is None or not entry.short or attn_mask is not None) and not is_plain():
        return call_under(scope, query, key, value, attn_mask, sinks, plain)
    if entry is None:
        options = plain_options(Options(*plain))
        if any(given is not made and type(given) is not type(made) for given, made in zip(plain, options, strict=True)):
            return _general(scope, query, key, value, attn_mask, sinks, tuple(options))
        entry = entry_for(scope, table_key, query, key, value, attn_mask, sinks, options)
    try:
        if attn_mask is None and sinks is None:
            result = entry.call(query, key, value)
        else:
            result = entry.call_masked(query, key, value, attn_mask, sinks)
    except Exception as error:
        kernels = is_kernels(error)
        if kernels and not is_usual(query, key, value, attn_mask, sinks):
            return call_under(scope, query, key, value, attn_mask, sinks, plain)
        if not (kernels and passes_over(error, entry.decision)):
            _record(scope, entry)
            if kernels:
                raise_kernel_error(error, entry.decision)
            raise
    else:
        _record(scope, entry)
        return result
    return _general(scope, query, key, value, attn_mask, sinks, plain)


def _record(scope: defaults.Scope, entry: Entry) -> None:
    if scope.recorder is not None:
        scope.recorder(entry.decision)


def _table_key(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, plain: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Give what the decision of a call depends on."""
    grads: Any = None
    if _grad_enabled():
        grads = (query.requires_grad, key.requires_grad, value.requires_grad)
    return (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        grads,
        plain,
        None if attn_mask is None else _mask_key(attn_mask, key, plain, grads is not None),
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device, grads is not None and sinks.requires_grad),
        query.is_cpu or place_key(query, key, value),
        autocast_dtype(query.device.type) if _autocast_on() else None,
        None if type(query) is Tensor else (type(query), type(key), type(value)),
    )


def _mask_key(attn_mask: Any, key: Tensor, plain: tuple[Any, ...], grad: bool) -> Any:
    if type(attn_mask) is Tensor or type(attn_mask) is Parameter:
        known = known_of_tensor(attn_mask)
        aligned = attn_mask.is_cpu or bias_is_aligned(attn_mask)
        return (attn_mask.shape, attn_mask.dtype, attn_mask.device, grad and attn_mask.requires_grad, known, aligned)
    if isinstance(attn_mask, Mask):
        dense = attn_mask.dense
        if dense is None and attn_mask.key is None:
            return attn_mask.signature
        known = known_of(attn_mask, key.shape[1 if plain[7] == "BSHD" else 2])
        if dense is None:
            return (attn_mask.signature, known)
        return (attn_mask.signature, known, grad and dense.requires_grad, dense.is_cpu or bias_is_aligned(dense))
    raise TypeError("a mask of another type is looked at anew at every call")
