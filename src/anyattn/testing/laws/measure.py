"""The true results of a case in float64, and the error that each result may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anyattn import reference
from anyattn.masks.objects import Mask
from anyattn.reference import tolerance
from anyattn.testing.cases.case import Inputs


@dataclass(frozen=True)
class Bound:
    """A true value in float64, and how far from it a result may be."""

    truth: Tensor
    allowed: Tensor

    def excess(self, result: Tensor, slack: float = 1.0) -> float:
        """Compute a result's worst error in multiples of what is allowed."""
        return tolerance.excess(result.detach(), self.truth, self.allowed * slack)

    def apart(self, one: Tensor, other: Tensor) -> float:
        """Compute how far apart two results are that should be equal; each may be one budget off the truth."""
        return tolerance.excess(one.detach(), other.detach().double(), self.allowed.expand_as(self.truth) * 2)


OVER: Mapping[str, tuple[int, ...]] = {
    "out": (1, 3),
    "lse": (2,),
    "query": (1, 3),
    "key": (1, 3),
    "value": (1, 3),
    "mask": (-2, -1),
}
"""The dimensions of each result that share one budget: a budget for each batch entry and head."""


ORDERS = 3
"""The number of orders of summation in which a plain computation's error is measured; one may be right by chance."""

MORE_ORDERS = 40
"""The number of orders before a result counts as wrong."""


def bounds(inputs: Inputs, *, gradients: bool = False, orders: int = ORDERS) -> dict[str, Bound]:
    """Compute the truth and the budget of the output and lse, and with `gradients` of the gradients.

    The budget is that of `anyattn.reference.tolerance` for the worst of a few plain computations. They differ in the
    order of keys and head_dim, and in the step that applies the scale. For gradients `_cancellation` is added.
    """
    dtype = inputs.case.torch_dtype
    plainly = torch.float32 if dtype == torch.float64 else dtype
    truths = _results(inputs, torch.float64, gradients)
    allowed = {name: torch.zeros((), dtype=torch.float64) for name in truths}
    for order in range(orders):
        plains = _results(inputs, plainly, gradients, order)
        for name, truth in truths.items():
            plain = plains[name].double()
            if dtype == torch.float64:
                # Errors scale with the unit roundoff. A plain float64 computation is the truth: it shows no error.
                plain = torch.where(torch.isfinite(truth), truth + (plain - truth) * _FINER, truth)
            budget = tolerance.lse_budget if name == "lse" else tolerance.budget
            one = budget(truth, plain, _stored(inputs, name), over=OVER[name])
            if dtype == torch.float64:
                one = 2 * one  # the truth is a float64 computation too, with the same error
            allowed[name] = torch.maximum(allowed[name].to(one.device), one)
    if gradients and truths["out"].numel():
        for name, band in _cancellation(inputs, truths["out"], truths["lse"]).items():
            allowed[name] = allowed[name] + band.amax(OVER[name], keepdim=True)
    # An lse beyond float32's range is infinite in it, as with a float64 bias of finfo.min.
    truths["lse"] = truths["lse"].float().double()
    return {name: Bound(truth, allowed[name]) for name, truth in truths.items()}


def truths(inputs: Inputs, gradients: bool) -> dict[str, Tensor]:
    """Compute the output, lse, and with `gradients` the gradients, in float64; lse is rounded to float32."""
    found = _results(inputs, torch.float64, gradients)
    found["lse"] = found["lse"].float().double()
    return found


def _stored(inputs: Inputs, name: str) -> torch.dtype:
    """Return the coarsest dtype in which a result is stored: a bias's gradient has the bias's dtype."""
    dtype = inputs.case.torch_dtype
    if dtype != torch.float64:
        return dtype
    dense = None if inputs.mask is None else inputs.mask.dense
    if name == "mask" and dense is not None:
        return dense.dtype
    return dtype


_FINER = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def _cancellation(inputs: Inputs, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """Compute what the gradients of scores lose by cancellation, in any order of summation.

    The gradient of a score is `P (dO.V - dO.O)` (Dao et al., arXiv:2205.14135, appendix B): a difference of two dot
    products, each rounded to at least one unit of the sum of its magnitudes. If one key has all the weight, the
    difference is zero, and a plain computation gets it exactly, since it subtracts the same number. Besides, P is
    computed again as `exp(score - lse)`; its relative error is the rounding of both in the accumulator's dtype.
    """
    case = inputs.case
    eps = torch.finfo(case.torch_dtype).eps
    group = case.heads // case.kv_heads
    weights = _weights(inputs)
    flow = cotangent(inputs, out).double().abs().transpose(1, 2)
    query, key, value = (
        inputs.bshd(tensor).detach().double().abs().transpose(1, 2)
        for tensor in (inputs.query, inputs.key, inputs.value)
    )
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    seen = flow @ value.transpose(-1, -2) + (flow * out.abs().transpose(1, 2)).sum(-1, keepdim=True)
    scale = abs(case.factor)
    exact = torch.finfo(torch.float64 if case.dtype == "float64" else torch.float32).eps
    # log P = score - lse, so |score| is at most |lse| + |log P|, and P |log P| at most 1/e.
    # The score itself is summed again; roundings of n terms add up to some sqrt(n) half units of the sum's magnitude
    # (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    again_units = max(1.0, math.sqrt(case.head_dim) / 2)
    size = 2 * lse.nan_to_num(0.0, 0.0, 0.0).abs().unsqueeze(-1) + again_units * scale * (query @ key.transpose(-1, -2))
    again = exact * (size * weights - torch.special.xlogy(weights, weights))
    lost = eps * weights * seen + again * seen
    found = {"query": (scale * lost @ key).transpose(1, 2)}
    of_key = scale * lost.transpose(-1, -2) @ query
    found["key"] = of_key.unflatten(1, (case.kv_heads, group)).sum(2).transpose(1, 2)
    of_value = again.transpose(-1, -2) @ flow
    found["value"] = of_value.unflatten(1, (case.kv_heads, group)).sum(2).transpose(1, 2)
    leaves = inputs.leaves()
    if "mask" in leaves:
        shape = (1,) * (4 - leaves["mask"].dim()) + tuple(leaves["mask"].shape)
        found["mask"] = lost.sum_to_size(shape).reshape(leaves["mask"].shape)
    return {name: band for name, band in found.items() if name in leaves}


def _weights(inputs: Inputs) -> Tensor:
    """Compute the softmax's weights (B, H, S_q, S_kv) in float64: the output for an identity matrix as value."""
    case = inputs.case
    eye = torch.eye(case.seqlen_kv, dtype=torch.float64, device=inputs.query.device)[None, :, None, :]
    eye = eye.expand(case.batch, -1, case.kv_heads, -1)
    value = eye if case.layout == "BSHD" else eye.transpose(1, 2)
    with torch.no_grad():
        return inputs.detached().replace(value=value).refer()[0].transpose(1, 2)


def _results(inputs: Inputs, dtype: torch.dtype, gradients: bool, order: int = 0) -> dict[str, Tensor]:
    """Run the reference in a dtype; `order` > 0 sums over keys and head_dim in another order."""
    mine = _fresh(inputs, dtype)
    leaves = mine.leaves() if gradients else {}
    with torch.set_grad_enabled(bool(leaves)):
        out, lse = _reordered(mine, order).refer(dtype)
    found = {"out": out.detach(), "lse": lse.detach()}
    if not leaves:
        return found
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent(inputs, out).to(dtype))
    named = dict(zip(leaves, grads, strict=True))
    return found | {name: grad if name == "mask" else inputs.bshd(grad) for name, grad in named.items()}


def _reordered(inputs: Inputs, order: int) -> Inputs:
    """Shuffle keys, with all that belongs to them, and head_dim: the same attention, summed in another order."""
    if not order:
        return inputs
    case, generator = inputs.case, torch.Generator().manual_seed(order)
    keys = torch.randperm(case.seqlen_kv, generator=generator).to(inputs.query.device)
    dims = torch.randperm(case.head_dim, generator=generator).to(inputs.query.device)
    axis = 1 if case.layout == "BSHD" else 2
    mask = inputs.mask
    if mask is not None:
        sizes = (case.batch, case.heads, case.seqlen_q, case.seqlen_kv)
        allowed = reference.allowed_positions(mask, *sizes).to(inputs.query.device)
        dense: Tensor = allowed
        if mask.dense is not None and mask.dense.dtype != torch.bool:
            dense = torch.where(allowed, mask.dense, -math.inf)
        mask = Mask(dense=dense[..., keys])
    query, key = inputs.query[..., dims], inputs.key.index_select(axis, keys)[..., dims]
    scale = case.factor
    if order % 2 and query.dtype in (torch.float32, torch.float64):
        # SDPA's plain kernel scales query and key, each by the root, in place of the scores.
        root = math.sqrt(abs(scale))
        query, key, case = query * root, key * math.copysign(root, scale), case.replace(scale=1.0)
    return inputs.replace(
        case=case,
        query=query,
        key=key,
        value=inputs.value.index_select(axis, keys),
        mask=mask,
    )


def _fresh(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Copy the inputs to leaves of another dtype, with the same `requires_grad`."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

    mask = inputs.mask
    if mask is not None and mask.dense is not None and mask.dense.requires_grad:
        mask = Mask(pattern=mask.pattern, key=mask.key, dense=copied(mask.dense), block=mask.block)
    elif mask is not None and mask.dense is not None and mask.dense.dtype == torch.float32 and dtype.itemsize == 2:
        # float32's finfo.min is -inf in a narrower dtype: the plain computation would lose the row, excusing any error.
        lowest = torch.finfo(dtype).min
        dense = torch.where(torch.isneginf(mask.dense), mask.dense, mask.dense.clamp_min(lowest))
        mask = Mask(pattern=mask.pattern, key=mask.key, dense=dense, block=mask.block)
    return inputs.replace(query=copied(inputs.query), key=copied(inputs.key), value=copied(inputs.value), mask=mask)


def cotangent(inputs: Inputs, out: Tensor) -> Tensor:
    """Return the gradient of the output, in the case's dtype."""
    if inputs.flow is not None:
        return inputs.flow
    generator = torch.Generator().manual_seed(inputs.case.seed + 1)
    drawn = torch.randn(out.shape, generator=generator).to(inputs.case.torch_dtype)
    return drawn.to(out.device)


def gradients(inputs: Inputs, out: Tensor) -> dict[str, Tensor]:
    """Run the backward of an output (B, S, H, D_v), and return the gradients in the reference's layout."""
    leaves = inputs.leaves()
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent(inputs, out))
    found = dict(zip(leaves, grads, strict=True))
    return {name: grad if name == "mask" else inputs.bshd(grad) for name, grad in found.items()}


def results(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Run a call and its backward, and return the output, lse and gradients."""
    out, lse = inputs.attend(backend)
    found = {"out": out.detach()} | ({} if lse is None else {"lse": lse})
    if inputs.leaves():
        found |= gradients(inputs, out)
    return found
