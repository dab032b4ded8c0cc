"""Whether a kernel's result on the very inputs is within the error budget, gradients included.

Big calls stay affordable: 16 rows of the output are compared, and of many heads and batch entries the first and last.
The gradient that goes back is zero in all other rows, so the gradients of key and value come from these rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn import reference
from anyattn.backend.protocol import Output
from anyattn.masks.objects import Mask
from anyattn.masks.values import parts_of
from anyattn.reference import tolerance
from anyattn.run.checks import SLACK, output_excess, rows_of_mask, sampled_rows
from anyattn.tuning.inputs import Inputs
from anyattn.types.spec import AttentionSpec

LARGEST = 1 << 26
"""Up to how many scores (sampled rows * keys * heads * batch entries) every head and batch entry is compared."""


def error_of(spec: AttentionSpec, inputs: Inputs, result: Output, *, quantised: bool) -> float:
    """Compute the error of a result as a multiple of its budget; above 1 is wrong.

    Args:
        spec: The call.
        inputs: What it was called with; gradients are those of the spec's `requires_grad`.
        result: The output, or `(out, lse)`; with gradients its graph is used up.
        quantised: Whether the kernel computes in int8 or fp8, which has a budget of its own.
    """
    seen, out_seen, small = _sampled(spec, inputs, result)
    parts = parts_of(seen.mask, seen.sinks)
    with torch.no_grad():
        worst = output_excess(small, seen.query, seen.key, seen.value, parts, out_seen, quantised=quantised)
    if spec.needs_grad:
        worst = max(worst, _gradient_error(spec, inputs, result, quantised=quantised))
    return worst


def _picked(spec: AttentionSpec) -> tuple[list[int], list[int]]:
    """Return the batch entries and the key/value heads that are compared."""
    batch, heads = list(range(spec.batch)), list(range(spec.num_kv_heads))
    rows = min(spec.seqlen_q, 16)
    if rows * spec.seqlen_kv * spec.num_heads * spec.batch <= LARGEST or spec.mask.block is not None:
        return batch, heads
    return list(dict.fromkeys((0, spec.batch - 1))), list(dict.fromkeys((0, spec.num_kv_heads - 1)))


def _query_heads(spec: AttentionSpec, kv_heads: list[int]) -> list[int]:
    group = spec.num_heads // spec.num_kv_heads
    return [head * group + member for head in kv_heads for member in range(group)]


def _take(tensor: Tensor, entries: list[int], heads: list[int], axis: int) -> Tensor:
    """Take batch entries and heads where the tensor has more than one of them."""
    for dimension, wanted in ((0, entries), (axis, heads)):
        if tensor.shape[dimension] > 1 and tensor.shape[dimension] != len(wanted):
            tensor = tensor.index_select(dimension, torch.tensor(wanted, device=tensor.device))
    return tensor


def _sampled(spec: AttentionSpec, inputs: Inputs, result: Output) -> tuple[Inputs, Output, AttentionSpec]:
    entries, kv_heads = _picked(spec)
    heads = _query_heads(spec, kv_heads)
    axis = 2 if spec.layout == "BSHD" else 1
    query = _take(inputs.query.detach(), entries, heads, axis)
    key, value = (_take(tensor.detach(), entries, kv_heads, axis) for tensor in (inputs.key, inputs.value))
    sinks = None if inputs.sinks is None else inputs.sinks.detach()[torch.tensor(heads, device=inputs.sinks.device)]
    out, lse = result if isinstance(result, tuple) else (result, None)
    seen = _take(out.detach(), entries, heads, axis)
    small = spec.replace(batch=len(entries), num_heads=len(heads), num_kv_heads=len(kv_heads), requires_grad=())
    mask = _mask_of(inputs.mask, entries, heads)
    both: Output = seen if lse is None else (seen, _take(lse.detach(), entries, heads, 1))
    return Inputs(query, key, value, mask, sinks), both, small


def _mask_of(mask: Mask | None, entries: list[int], heads: list[int]) -> Mask | None:
    if mask is None:
        return None
    key, dense = mask.key, mask.dense
    if key is not None and key.shape[0] not in (1, len(entries)):
        key = key[torch.tensor(entries, device=key.device)]
    if dense is not None:
        dense = _take(dense.detach()[(None,) * (4 - dense.dim())], entries, heads, 1)
    return Mask(pattern=mask.pattern, key=key, dense=dense, block=mask.block)


def _gradient_error(spec: AttentionSpec, inputs: Inputs, result: Output, *, quantised: bool) -> float:
    """Compare the gradients of query, key and value with the reference's, for an upstream gradient on sampled rows."""
    out = result[0] if isinstance(result, tuple) else result
    axis = 1 if spec.layout == "BSHD" else 2
    rows = sampled_rows(spec.seqlen_q, out.device)
    generator = torch.Generator(out.device).manual_seed(1)
    shape = [len(rows) if dimension == axis else size for dimension, size in enumerate(out.shape)]
    upstream = torch.randn(shape, generator=generator, device=out.device).to(out.dtype)
    whole = torch.zeros_like(out).index_copy(axis, rows, upstream)
    named = [name for name in ("query", "key", "value") if name in spec.requires_grad]
    if not named:
        return 0.0
    found = torch.autograd.grad(out, [getattr(inputs, name) for name in named], whole)
    seen, _, small = _sampled(spec, inputs, result)
    entries, kv_heads = _picked(spec)
    heads = _query_heads(spec, kv_heads)
    head_axis = 3 - axis
    sampled_upstream = _take(upstream, entries, heads, head_axis)
    truth = _reference_gradients(small, seen, rows, sampled_upstream, torch.float64)
    plain = _reference_gradients(small, seen, rows, sampled_upstream, tolerance.plain_dtype(spec.dtype))
    worst = 0.0
    for name, gradient in zip(named, found, strict=True):
        gradient = _take(gradient, entries, heads if name == "query" else kv_heads, head_axis)
        gradient = gradient.transpose(1, 2) if spec.layout == "BHSD" else gradient
        true = truth[name]
        if name == "query":
            gradient = gradient[:, rows]
        if quantised:
            allowed = SLACK * tolerance.quantised_budget(true, over=(1, 3))
            worst = max(worst, tolerance.norm_excess(gradient, true, allowed, over=(1, 3)))
            continue
        near = tolerance.refined(true, plain[name], spec.dtype)
        allowed = SLACK * tolerance.budget(true, near, spec.dtype, over=(1, 3))
        worst = max(worst, tolerance.excess(gradient, true, allowed))
    return worst


def _reference_gradients(
    spec: AttentionSpec, inputs: Inputs, rows: Tensor, upstream: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute the gradients of some rows of query, and of key and value, by the definition in a dtype."""
    tensors: list[Any] = [inputs.query, inputs.key, inputs.value]
    if spec.layout == "BHSD":
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
        upstream = upstream.transpose(1, 2)
    query, key, value = tensors
    mask = rows_of_mask(spec, parts_of(inputs.mask), rows, key.device)
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in (query[:, rows], key, value))
    options = {"scale": spec.scale, "softcap": spec.softcap}
    with torch.enable_grad():
        out, _ = reference.attention(query, key, value, mask, sinks=inputs.sinks, dtype=dtype, **options)
    found = torch.autograd.grad(out, (query, key, value), upstream.to(dtype))
    return dict(zip(("query", "key", "value"), found, strict=True))
