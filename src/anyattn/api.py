"""The public calls: attention, its drop-in for torch's SDPA, and what shows and steers the choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from anyattn import environment, policy, registry
from anyattn.backend import Output, Runner
from anyattn.decision import Decision, Precision, Preference
from anyattn.describe import Options
from anyattn.dispatch import decide as _decide
from anyattn.dispatch import (
    decision_for,
    describe,
    entry_for,
    explain_failure,
    make_entry,
    make_preference,
    raise_kernel_error,
    scope_of_call,
    traced_call,
)
from anyattn.errors import InvalidCallError
from anyattn.masks import Mask
from anyattn.names import BY_NAME
from anyattn.prepare import known_of, known_of_tensor
from anyattn.reasons import Reason
from anyattn.spec import AttentionSpec

Backends = str | list[str] | tuple[str, ...]
"""A name, an alias, `"auto"`, or a list in order of preference."""

_current = policy.current.get
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
    if backend is not None:
        scope = scope_of_call(scope, backend)
    if attn_mask is None and sinks is None:
        try:
            call = scope.short[
                query.shape,
                key.shape,
                value.shape,
                query.dtype,
                query.is_cpu,
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
                return call(query, key, value)
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is wrapped, and raised again
                options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
                explain_failure(error, scope, query, key, value, options)
    options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
    return _general(scope, query, key, value, attn_mask, sinks, options)


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
    options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BHSD")
    if _tracing():
        return traced_call(query, key, value, attn_mask, sinks, options, backend)
    scope = _current()
    if backend is not None:
        scope = scope_of_call(scope, backend)
    return _general(scope, query, key, value, attn_mask, sinks, options)


def _general(
    scope: policy.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
) -> Any:
    """Run any call: find it in the table by everything that its decision depends on, or decide it."""
    table_key: Any = None
    try:
        table_key = _table_key(query, key, value, attn_mask, sinks, options)
        entry = scope.table[table_key]
    except KeyError:
        entry = entry_for(scope, table_key, query, key, value, attn_mask, sinks, options)
    except (TypeError, AttributeError, RuntimeError):
        # Not tensors, symbolic sizes, or an unhashable option: described anew, and refused where it is wrong.
        entry = entry_for(scope, None, query, key, value, attn_mask, sinks, options)
    try:
        if attn_mask is None and sinks is None:
            return entry.call(query, key, value)
        return entry.call_masked(query, key, value, attn_mask, sinks)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is wrapped, and raised again
        raise_kernel_error(error, entry.decision)


def _table_key(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, options: Options
) -> tuple[Any, ...]:
    """Give what the decision of a call depends on."""
    grad = _grad_enabled()
    on_cpu = query.is_cpu
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
        grad and query.requires_grad,
        grad and key.requires_grad,
        grad and value.requires_grad,
        options,
        None if attn_mask is None else _mask_key(attn_mask, key, options, grad),
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device, grad and sinks.requires_grad),
        None if on_cpu else _storage_key(query, key, value),
        _autocast_key(query) if _autocast_on() else None,
        None if type(query) is Tensor else (type(query), type(key), type(value)),
    )


def _mask_key(attn_mask: Any, key: Tensor, options: Options, grad: bool) -> Any:
    if isinstance(attn_mask, Mask):
        dense = attn_mask.dense
        if dense is None and attn_mask.key is None:
            return attn_mask.signature
        known = known_of(attn_mask, key.shape[1 if options.layout == "BSHD" else 2])
        return (attn_mask.signature, known, grad and dense is not None and dense.requires_grad)
    if type(attn_mask) is Tensor:
        known = known_of_tensor(attn_mask)
        return (attn_mask.shape, attn_mask.dtype, attn_mask.device, grad and attn_mask.requires_grad, known)
    raise TypeError("a mask of another type is looked at anew at every call")


def _storage_key(query: Tensor, key: Tensor, value: Tensor) -> Any:
    try:
        start = (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15
    except RuntimeError:
        start = -1
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (query.stride(), key.stride(), value.stride(), start, deterministic)


def _autocast_key(query: Tensor) -> Any:
    kind = query.device.type
    return (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


# --- choosing -----------------------------------------------------------------------------------------------------


class attention_backend:
    """Choose the backend of every call inside a `with` block, in this thread or task alone.

    A module's own pin beats the block, which is said once; `override=True` turns that round.

    Args:
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        override: Whether the block beats pins.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"` or `"fp8"`.

    Raises:
        UnknownBackendError: If a name is unknown.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 8, 2, 16)
        >>> with anyattn.attention_backend("native_math"):
        ...     out = anyattn.attention(q, k, v)
    """

    def __init__(self, backend: Backends, *, override: bool = False, precision: Precision = "exact") -> None:
        self.override = override
        if _tracing():
            is_list = not isinstance(backend, str)
            names = tuple(backend) if is_list else (backend,)
            mode = "prefer" if is_list or backend == "auto" else "require"
            self.wish = Preference(names, mode, "context", precision)  # type: ignore[arg-type]
        else:
            self.wish = make_preference(backend, "context", precision)
        self._tokens: list[Any] = []

    def __enter__(self) -> attention_backend:
        if _tracing():
            policy.traced.append(policy.plain("context", self.wish, self.override))
        else:
            self._tokens.append(policy.current.set(policy.enter(_current(), self.wish, self.override)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _tracing():
            policy.traced.pop()
        else:
            policy.current.reset(self._tokens.pop())


def set_default_backend(backend: Backends | None, *, precision: Precision = "exact") -> None:
    """Set the process's default, for calls that no block, pin or argument decides; None clears it.

    Raises:
        UnknownBackendError: If a name is unknown; nothing is changed then.
    """
    policy.set_default(None if backend is None else make_preference(backend, "default", precision))


def reset() -> None:
    """Forget every decision, and look at the machine and the environment variables again."""
    environment.detect.cache_clear()
    policy.forget()


# --- seeing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One known backend on this machine.

    Attributes:
        name: Its name.
        family: The group that shares a kernel source.
        installed: Whether its kernel's package is there.
        version: That package's version, or the empty string.
        usable: Whether some call can run with it here.
        exact: Whether it computes in the inputs' precision.
        needs: What it needs.
        install: The command that installs that; empty where it comes with torch.
        reasons: Why it isn't usable.
    """

    name: str
    family: str
    installed: bool
    version: str
    usable: bool
    exact: bool
    needs: str
    install: str
    reasons: tuple[Reason, ...]


def backends(env: environment.Environment | None = None) -> tuple[BackendRow, ...]:
    """List every known backend, built or not, usable here or not, with every reason.

    Args:
        env: The machine to ask about; None is this one.
    """
    env = environment.detect() if env is None else env
    rows = []
    for name, backend in registry.known(registry.names()):
        known = BY_NAME.get(name)
        if backend is None:
            reasons: tuple[Reason, ...] = (registry.not_built(name),)
            exact = known is not None and known.family != "sage"
        else:
            reasons = tuple(backend.availability(env))
            exact = all(caps.exact for caps in backend.declarations.values())
        family = backend.family if backend is not None else (known.family if known else "")
        missing = any(reason.code in ("not_built", "not_installed") for reason in reasons)
        version = str(env.torch) if family in ("native", "flex") else ""
        rows.append(
            BackendRow(
                name,
                family,
                not missing,
                version,
                not reasons,
                exact,
                known.needs if known else "",
                known.install if known else "",
                reasons,
            )
        )
    return tuple(rows)


def explain(
    query: Tensor | AttentionSpec,
    key: Tensor | None = None,
    value: Tensor | None = None,
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
    env: environment.Environment | None = None,
) -> Decision:
    """Say what `attention` would run for these arguments, and why not each other backend; runs nothing.

    Args:
        query: As for `attention`, or a spec in place of all tensors.
        key: As for `attention`.
        value: As for `attention`.
        attn_mask: As for `attention`.
        dropout_p: As for `attention`.
        is_causal: As for `attention`.
        scale: As for `attention`.
        enable_gqa: As for `attention`.
        window: As for `attention`.
        softcap: As for `attention`.
        sinks: As for `attention`.
        return_lse: As for `attention`.
        backend: As for `attention`.
        env: The machine to suppose, such as `anyattn.environment.preset("h100")`; None is this one.

    Returns:
        The decision; where nothing admits the call its `chosen` is None.

    Raises:
        InvalidCallError: If the call is wrong for any backend.
    """
    if isinstance(query, AttentionSpec):
        spec = query
    else:
        options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
        spec = describe(query, key, value, attn_mask, sinks, options)  # type: ignore[arg-type]
    scope = _current()
    if backend is not None:
        scope = scope_of_call(scope, backend)
    return decision_for(spec, scope, environment.detect() if env is None else env)


def plan(spec: AttentionSpec, *, backend: Backends | None = None) -> Any:
    """Make the choice for a spec once, and give a callable that has it made.

    Args:
        spec: The call, such as `anyattn.explain(...).spec`.
        backend: As for `attention`.

    Returns:
        `run(query, key, value)` for a spec without mask and sinks, else
        `run(query, key, value, attn_mask=None, sinks=None)`. It compares shapes and dtype with the spec's, and leaves
        all else to the caller: strides, devices and gradients must be as described.

    Raises:
        UnsupportedCallError: If nothing admits the call.
    """
    scope = _current()
    if backend is not None:
        scope = scope_of_call(scope, backend)
    entry = make_entry(_decide(spec, scope))
    order = (0, 1, 2, 3) if spec.layout == "BSHD" else (0, 2, 1, 3)
    full = (
        (spec.batch, spec.seqlen_q, spec.num_heads, spec.head_dim),
        (spec.batch, spec.seqlen_kv, spec.num_kv_heads, spec.head_dim),
        (spec.batch, spec.seqlen_kv, spec.num_kv_heads, spec.head_dim_v),
    )
    shapes = tuple(tuple(shape[axis] for axis in order) for shape in full)
    dtype = spec.dtype
    if spec.mask.key or spec.mask.dense or spec.mask.block or spec.sinks:
        return _masked_plan(entry, shapes, dtype)
    call: Runner = entry.call

    def run(query: Tensor, key: Tensor, value: Tensor) -> Output:
        if (query.shape, key.shape, value.shape) != shapes or query.dtype is not dtype:
            raise _off_plan(shapes, dtype, query, key, value)
        return call(query, key, value)

    run.decision = entry.decision  # type: ignore[attr-defined]
    return run


def _masked_plan(entry: Any, shapes: Any, dtype: torch.dtype) -> Any:
    spec: AttentionSpec = entry.decision.spec

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, sinks: Tensor | None = None) -> Output:
        if (query.shape, key.shape, value.shape) != shapes or query.dtype is not dtype:
            raise _off_plan(shapes, dtype, query, key, value)
        if (attn_mask is None) != spec.mask.is_empty or (sinks is None) == spec.sinks:
            raise InvalidCallError(
                "The plan was made with a mask or sinks that this call lacks, or the other way round."
            )
        return entry.call_masked(query, key, value, attn_mask, sinks)  # type: ignore[no-any-return]

    run.decision = entry.decision  # type: ignore[attr-defined]
    return run


def _off_plan(shapes: Any, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor) -> InvalidCallError:
    given = tuple(tuple(tensor.shape) for tensor in (query, key, value))
    return InvalidCallError(f"The plan is for {shapes} in {dtype}; {given} in {query.dtype} was given. Plan again.")


@contextmanager
def record() -> Iterator[list[Decision]]:
    """Collect the decision of every call made inside the block, in this thread or task.

    Calls inside code compiled by torch.compile run without Python and aren't seen.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 8, 2, 16)
        >>> with anyattn.record() as calls:
        ...     out = anyattn.attention(q, k, v)
        >>> [call.chosen for call in calls]
        ['native']
    """
    calls: list[Decision] = []
    outer = _current()

    def told(decision: Decision) -> None:
        calls.append(decision)
        if outer.recorder is not None:
            outer.recorder(decision)

    changed = policy.current.set(policy.recording(outer, told))
    try:
        yield calls
    finally:
        policy.current.reset(changed)
