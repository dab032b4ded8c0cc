"""The checks that read values: on with ANYATTN_CHECKS=1 or DIFFUSERS_ATTN_CHECKS=1, never otherwise."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from anyattn import reference
from anyattn.backend.protocol import Output, Parts, Plan
from anyattn.errors import AnyattnWarning, InvalidCallError, KernelError
from anyattn.lowering.dense import key_mask
from anyattn.lowering.host_lengths import check_starts
from anyattn.masks.objects import Mask
from anyattn.masks.values import live_rows
from anyattn.process.tracing import has_values
from anyattn.reference import tolerance
from anyattn.scopes import defaults
from anyattn.selection.faults import outside
from anyattn.types.spec import AttentionSpec

SAMPLED_ROWS = 16
"""How many query rows of a call are compared with the reference."""

SLACK = 4.0
"""How many budgets of `anyattn.reference.tolerance` an error may be. The budget comes from one plain run, which may be
exact by chance; a wrong kernel is off by far more."""


_said: list[bool] = []


def can_check(*tensors: Tensor | None) -> bool:
    """Whether there are values to check; if not, warn once."""
    if has_values(*tensors):
        return True
    if not _said:
        _said.append(True)
        text = (
            "The value checks (ANYATTN_CHECKS) are skipped if there are no values to read: while a call is traced, "
            "transformed or captured in a CUDA graph, and on fake and meta tensors."
        )
        warnings.warn(text, AnyattnWarning, stacklevel=outside())
    return False


def check_inputs(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, parts: Parts, value_max: float | None = None
) -> None:
    """Check the values of a call's tensors.

    Raises:
        InvalidCallError: For NaN or infinity in query, key or value (at masked positions too: a kernel may multiply
            them by a zero weight), magnitudes in value above `value_max`, NaN or +inf in a mask, and key lengths
            outside [0, S_kv].
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidCallError(
                f"{name} holds NaN or infinity. Masked positions must be finite too: fill padding with zeros."
            )
    check_magnitude(value, value_max)
    if parts.dense is not None and parts.dense.is_floating_point():
        meaningless = torch.isnan(parts.dense) | (parts.dense == float("inf"))
        if bool(meaningless.any()):
            raise InvalidCallError("The additive mask holds NaN or +inf; it may hold finite values and -inf only.")
    if parts.key is not None and parts.key.dtype != torch.bool and parts.key.numel():
        low, high = int(parts.key.min()), int(parts.key.max())
        if low < 0 or high > spec.seqlen_kv:
            raise InvalidCallError(f"Key lengths must be in [0, {spec.seqlen_kv}]; they range from {low} to {high}.")
    _warn_of_dead_rows(spec, parts)


def check_magnitude(value: Tensor, value_max: float | None) -> None:
    """Check the largest magnitude in value; None is no limit but the dtype's.

    Raises:
        InvalidCallError: If it is above `value_max`.
    """
    if value_max is not None and value.numel() and float(value.detach().abs().max()) > value_max:
        raise InvalidCallError(
            f"value holds magnitudes above {value_max:g}, the largest that the chosen kernel can represent. "
            "Scale value down and the output up, or choose another backend."
        )


def _warn_of_dead_rows(spec: AttentionSpec, parts: Parts) -> None:
    masks = [] if parts.key is None else [key_mask(parts.key, spec.seqlen_kv)]
    masks += [] if parts.dense is None else [parts.dense]
    if any(not bool(live_rows(mask).all()) for mask in masks):
        warnings.warn("The mask leaves a query row without any key; its output is zeros.", AnyattnWarning, stacklevel=5)


def check_output(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts, result: Output, *, quantised: bool = False
) -> None:
    """Compare sampled rows of a result with the reference.

    Raises:
        KernelError: If their error exceeds the budget of `anyattn.reference.tolerance`, which is larger if `quantised`.
    """
    if not plan.spec.dropout_p and not plan.spec.is_empty:
        worst = output_excess(plan.spec, query, key, value, parts, result, quantised=quantised)
        _judge(plan, worst, min(plan.spec.seqlen_q, SAMPLED_ROWS))


def output_excess(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, parts: Parts, result: Output, *, quantised: bool
) -> float:
    """Compare sampled rows of a result with the reference; return the error as a multiple of what is allowed."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    if spec.layout == "BHSD":
        query, key, value, out = (tensor.transpose(1, 2) for tensor in (query, key, value, out))
    rows = sampled_rows(spec.seqlen_q, query.device)
    mask = rows_of_mask(spec, parts, rows, key.device)
    inputs = (query[:, rows].detach(), key.detach(), value.detach())
    with torch.no_grad():
        truth, true_lse = _refer(spec, inputs, mask, parts.sinks, torch.float64)
        if quantised:
            return _quantised_excess(truth, true_lse, out.detach()[:, rows], None if lse is None else lse[:, :, rows])
        plain, plain_lse = _refer(spec, inputs, mask, parts.sinks, tolerance.plain_dtype(query.dtype))
        plain, plain_lse = (tolerance.refined(*pair, query.dtype) for pair in ((truth, plain), (true_lse, plain_lse)))
        allowed = tolerance.budget(truth, plain, query.dtype, over=(1, 3))
        worst = tolerance.excess(out.detach()[:, rows], truth, SLACK * allowed)
        if lse is not None:
            allowed = tolerance.lse_budget(true_lse, plain_lse, query.dtype, over=(2,))
            worst = max(worst, tolerance.excess(lse[:, :, rows], true_lse.float().double(), SLACK * allowed))
    return worst


def _judge(plan: Plan, worst: float, rows: int) -> None:
    if worst > 1:
        raise KernelError(
            f"The attention backend {plan.backend} ({plan.lowering.entry}) disagrees with the reference: its error "
            f"is {worst:.3g} times what is allowed, on {rows} sampled rows of {plan.spec}. Choose another backend, and "
            "run `anyattn verify` on this one.",
            backend=plan.backend,
        )


def _quantised_excess(truth: Tensor, true_lse: Tensor, out: Tensor, lse: Tensor | None) -> float:
    allowed = SLACK * tolerance.quantised_budget(truth, over=(1, 3))
    worst = tolerance.norm_excess(out, truth, allowed, over=(1, 3))
    if lse is not None:
        allowed = SLACK * tolerance.quantised_budget(true_lse, over=(2,), is_lse=True)
        worst = max(worst, tolerance.norm_excess(lse, true_lse.float().double(), allowed, over=(2,)))
    return worst


def _refer(
    spec: AttentionSpec,
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Mask | None,
    sinks: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return reference.attention(*inputs, mask, scale=spec.scale, softcap=spec.softcap, sinks=sinks, dtype=dtype)


def sampled_rows(seqlen_q: int, device: torch.device) -> Tensor:
    """Return the indices of the query rows that are compared, the first and the last among them."""
    count = min(seqlen_q, SAMPLED_ROWS)
    rows: Tensor = torch.unique(torch.linspace(0, seqlen_q - 1, count, device=device).round().long())
    return rows


def rows_of_mask(spec: AttentionSpec, parts: Parts, rows: Tensor, device: torch.device) -> Mask | None:
    """Return the mask of some query rows, with its pattern written out."""
    pattern = spec.mask.pattern
    columns = torch.arange(spec.seqlen_kv, device=device)[None, :]
    allowed = torch.ones(len(rows), spec.seqlen_kv, dtype=torch.bool, device=device)
    if pattern is not None:
        position = rows[:, None] + (spec.seqlen_kv - spec.seqlen_q if pattern.align == "lower_right" else 0)
        if pattern.left >= 0:
            allowed = allowed & (columns >= position - pattern.left)
        if pattern.right >= 0:
            allowed = allowed & (columns <= position + pattern.right)
    allowed = allowed[None, None]
    if parts.block is not None:
        whole = reference.allowed_positions(
            Mask(block=parts.block), spec.batch, spec.num_heads, spec.seqlen_q, spec.seqlen_kv
        )
        allowed = allowed & whole.to(device)[:, :, rows]
    if parts.dense is None:
        return Mask(key=parts.key, dense=allowed)
    dense = parts.dense if parts.dense.shape[2] == 1 else parts.dense[:, :, rows]
    joined = allowed & dense if dense.dtype == torch.bool else torch.where(allowed, dense, float("-inf"))
    return Mask(key=parts.key, dense=joined)


def check_packed_finite(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that the values of packed tensors are finite.

    Raises:
        InvalidCallError: If one isn't.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidCallError(f"{name} holds NaN or infinity; every value must be finite.")


def check_packed(
    query: object, key: object, value: object, cu_q: object, cu_k: object, max_q: object, max_k: object
) -> None:
    """Check the arguments of a packed call, as far as possible without waiting for a device.

    Raises:
        InvalidCallError: If no backend can take the call.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InvalidCallError(f"{name} must be a tensor (tokens, heads, head_dim); {given} was given.")
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    if key.shape[0] != value.shape[0]:
        raise InvalidCallError(
            f"key and value must have the same number of tokens; {key.shape[0]} and {value.shape[0]} were given."
        )
    for name, starts, most in (("q", cu_q, max_q), ("k", cu_k, max_k)):
        symbol = isinstance(most, torch.SymInt | Tensor)
        if not symbol and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise InvalidCallError(f"max_seqlen_{name} must be an int >= 0; {most!r} was given.")
        if not isinstance(starts, Tensor) or starts.dim() != 1 or starts.dtype != torch.int32 or not starts.shape[0]:
            given = f"{starts.dtype} {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
            raise InvalidCallError(
                f"cu_seqlens_{name} must be an int32 tensor (batch + 1,) that begins with 0; {given} was given."
            )
        if starts.device != query.device:
            raise InvalidCallError(
                f"cu_seqlens_{name} must be on query's device, {query.device}; it is on {starts.device}."
            )
    assert isinstance(cu_q, Tensor)
    assert isinstance(cu_k, Tensor)
    if cu_q.shape != cu_k.shape:
        raise InvalidCallError(
            f"cu_seqlens_q and cu_seqlens_k must have the same length, batch + 1; given {len(cu_q)} and {len(cu_k)}."
        )
    if (query.is_cpu and has_values(cu_q, cu_k)) or (defaults.checks_enabled() and can_check(cu_q, cu_k)):
        assert isinstance(max_q, int)
        assert isinstance(max_k, int)
        check_starts("q", cu_q.tolist(), max_q, query.shape[0])
        check_starts("k", cu_k.tolist(), max_k, key.shape[0])
