"""Laws about numbers: right, permutation, strides, rows without keys, and halves that merge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyattn import reference
from anyattn.lowering.dense import key_mask
from anyattn.masks.functions import MaskFunction
from anyattn.masks.objects import Mask
from anyattn.testing.cases.case import Case, Inputs
from anyattn.testing.laws.base import (
    TOO_COARSE,
    LawBroken,
    LawResult,
    apart,
    excesses,
    inapplicable,
    judged,
    reasons_against,
    refused,
    too_coarse,
)
from anyattn.testing.laws.measure import Bound, bounds, cotangent, results
from anyattn.testing.laws.quantised import bounds_for, format_of, norm_bounds


def right(backend: str, case: Case) -> LawResult:
    """Law 1: an accepted call is right against float64: output, lse and gradients."""
    inputs = case.build()
    against = reasons_against(backend, inputs)
    if against:
        return refused("right", backend, case, against)
    if too_coarse(backend, inputs):
        return inapplicable("right", backend, case, TOO_COARSE)
    found = results(inputs, backend)
    wrong = _form(inputs, found)
    if wrong:
        raise LawBroken("right", backend, case, wrong)
    grad = bool(inputs.leaves())
    worst = judged(
        "right",
        backend,
        case,
        lambda orders: excesses(bounds_for(backend, inputs, gradients=grad, orders=orders), found),
    )
    return LawResult("right", backend, case, "passed", worst)


def _form(inputs: Inputs, found: dict[str, Tensor]) -> str:
    """Return what is wrong with the results' shapes and dtypes; empty if nothing is."""
    case, query = inputs.case, inputs.query
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "out": ((case.batch, case.seqlen_q, case.heads, case.head_dim_v or case.head_dim), query.dtype)
    }
    if case.lse:
        wanted["lse"] = ((case.batch, case.heads, case.seqlen_q), torch.float32)
    for name, (shape, dtype) in wanted.items():
        if name not in found:
            return f"{name} was asked for and not given"
        result = found[name]
        if tuple(result.shape) != shape or result.dtype != dtype or result.device != query.device:
            return f"{name} is {result.dtype} {tuple(result.shape)} on {result.device}, not {dtype} {shape}"
        if name == "lse" and result.requires_grad:
            return "lse carries a gradient; it is detached by definition"
    return ""


def permutation(backend: str, case: Case) -> LawResult:
    """Law 4: batch entries and heads are independent: permuting them permutes the result."""
    inputs = case.build()
    against = reasons_against(backend, inputs)
    if against:
        return refused("permutation", backend, case, against)
    if too_coarse(backend, inputs):
        return inapplicable("permutation", backend, case, TOO_COARSE)
    if _has_blocks(inputs):
        return inapplicable("permutation", backend, case, "a block mask, which can't be permuted")
    where = inputs.query.device
    batch = torch.arange(case.batch, device=where).roll(1)
    kv = torch.arange(case.kv_heads, device=where).roll(1)
    group = case.heads // case.kv_heads
    heads = (kv[:, None] * group + torch.arange(group, device=where).flip(0)).flatten()
    moved = _permuted(inputs, batch, heads, kv)
    if inputs.leaves():
        flow = cotangent(inputs, _blank(inputs))
        inputs, moved = inputs.replace(flow=flow), moved.replace(flow=_permute(flow, "out", batch, heads, kv))
    before, after = results(inputs, backend), results(moved, backend)
    back = {name: _permute(result, name, batch, heads, kv) for name, result in before.items()}

    def measured(orders: int) -> dict[str, float]:
        known = bounds_for(backend, moved, gradients=bool(inputs.leaves()), orders=orders)
        return apart(known, after, back)

    worst = judged("permutation", backend, case, measured)
    return LawResult("permutation", backend, case, "passed", worst)


def _blank(inputs: Inputs) -> Tensor:
    case = inputs.case
    return inputs.query.new_empty(case.batch, case.seqlen_q, case.heads, case.head_dim_v or case.head_dim)


def _permute(tensor: Tensor, name: str, batch: Tensor, heads: Tensor, kv: Tensor) -> Tensor:
    """Permute a result: (B, S, H, D), or (B, H, ...) for lse and masks; dimensions of 1 stay."""
    axis = 1 if name in ("lse", "mask") else 2
    order = kv if name in ("key", "value") else heads
    if tensor.dim() < 4 and name == "mask":
        tensor = tensor[(None,) * (4 - tensor.dim())]
    if tensor.shape[0] > 1:
        tensor = tensor.index_select(0, batch.to(tensor.device))
    if tensor.shape[axis] > 1:
        tensor = tensor.index_select(axis, order.to(tensor.device))
    return tensor


def _has_blocks(inputs: Inputs) -> bool:
    """Whether the mask has a block mask, which is more than a function."""
    return inputs.mask is not None and not isinstance(inputs.mask.block, MaskFunction | None)


def _permuted_function(function: MaskFunction, batch: Tensor, heads: Tensor) -> MaskFunction:
    mask_mod = function.mask_mod

    def permuted(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        # Kernels call it with indices on the call's device, `looks_at` with indices on the function's own device.
        entry = batch.to(b.device)[b] if function.per_batch else b
        return mask_mod(entry, heads.to(h.device)[h] if function.per_head else h, q, kv)

    return MaskFunction(permuted, function.per_batch, function.per_head, function.sizes, function.captured)


def _permuted(inputs: Inputs, batch: Tensor, heads: Tensor, kv: Tensor) -> Inputs:
    def moved(tensor: Tensor, order: Tensor) -> Tensor:
        axis = 2 if inputs.case.layout == "BSHD" else 1
        found = tensor.detach().index_select(0, batch.to(tensor.device)).index_select(axis, order.to(tensor.device))
        return found.requires_grad_(tensor.requires_grad)

    mask = inputs.mask
    if mask is not None:
        dense = mask.dense
        if dense is not None:
            dense = _permute(dense.detach(), "mask", batch, heads, kv).requires_grad_(dense.requires_grad)
        key = mask.key
        if key is not None and key.shape[0] > 1:
            key = key.index_select(0, batch.to(key.device))
        block = mask.block
        if isinstance(block, MaskFunction):
            block = _permuted_function(block, batch, heads)
        mask = Mask(pattern=mask.pattern, key=key, dense=dense, block=block)
    sinks = None if inputs.sinks is None else inputs.sinks.index_select(0, heads.to(inputs.sinks.device))
    return inputs.replace(
        query=moved(inputs.query, heads),
        key=moved(inputs.key, kv),
        value=moved(inputs.value, kv),
        mask=mask,
        sinks=sinks,
    )


def strides(backend: str, case: Case) -> LawResult:
    """Law 5: storage doesn't matter: the result for a view is the result for its contiguous copy."""
    inputs = case.build()
    against = reasons_against(backend, inputs)
    if against:
        return refused("strides", backend, case, against)
    copies = {
        name: getattr(inputs, name).detach().clone(memory_format=torch.contiguous_format).requires_grad_(asked)
        for name, asked in (
            ("query", inputs.query.requires_grad),
            ("key", inputs.key.requires_grad),
            ("value", inputs.value.requires_grad),
        )
    }
    plain = inputs.replace(**copies)
    against = reasons_against(backend, plain)
    if against:
        return refused("strides", backend, case, against)
    if too_coarse(backend, inputs):
        return inapplicable("strides", backend, case, TOO_COARSE)
    ones, others, grad = results(inputs, backend), results(plain, backend), bool(inputs.leaves())
    worst = judged(
        "strides",
        backend,
        case,
        lambda orders: apart(bounds_for(backend, inputs, gradients=grad, orders=orders), ones, others),
    )
    return LawResult("strides", backend, case, "passed", worst)


def dead_rows(backend: str, case: Case) -> LawResult:
    """Law 8: a row without a key gets zeros, lse -inf and no gradient; all other numbers are finite."""
    inputs = case.build()
    against = reasons_against(backend, inputs)
    if against:
        return refused("dead_rows", backend, case, against)
    sizes = (case.batch, case.heads, case.seqlen_q, case.seqlen_kv)
    allowed = reference.allowed_positions(inputs.mask, *sizes).to(inputs.query.device)
    dead = ~allowed.any(-1)
    if not bool(dead.any()):
        return inapplicable("dead_rows", backend, case, "a mask that leaves every row a key")
    found = results(inputs, backend)
    wrong = [name for name, result in found.items() if name != "lse" and not bool(torch.isfinite(result).all())]
    if wrong:
        raise LawBroken("dead_rows", backend, case, f"not finite: {', '.join(wrong)}", math.inf)
    rows = dead.transpose(1, 2)
    if bool(found["out"][rows].any()):
        raise LawBroken("dead_rows", backend, case, "a row without a key isn't zeros", math.inf)
    if "lse" in found and inputs.sinks is None and not bool((found["lse"][dead] == -math.inf).all()):
        raise LawBroken("dead_rows", backend, case, "the lse of a row without a key isn't -inf", math.inf)
    if "query" in found and bool(found["query"][rows].any()):
        raise LawBroken("dead_rows", backend, case, "the query's gradient in a row without a key isn't 0", math.inf)
    unseen = ~allowed.reshape(case.batch, case.kv_heads, -1, case.seqlen_kv).any(2).transpose(1, 2)
    for name in ("key", "value"):
        if name in found and bool(found[name][unseen].any()):
            raise LawBroken("dead_rows", backend, case, f"the {name}'s gradient where no row looks isn't 0", math.inf)
    return LawResult("dead_rows", backend, case, "passed")


def halves(backend: str, case: Case) -> LawResult:
    """Law 10: attention over two halves of the keys, merged by their lse, is attention over all of them."""
    inputs = case.build().detached()
    if case.seqlen_kv < 2 or _has_blocks(inputs) or case.sinks:
        return inapplicable("halves", backend, case, "keys that can't be halved: one key, a block mask, or sinks")
    middle = case.seqlen_kv // 2
    whole, parts = inputs, [_keys(inputs, 0, middle), _keys(inputs, middle, case.seqlen_kv)]
    for some in (whole, *parts):
        against = reasons_against(backend, some)
        if against:
            return refused("halves", backend, case, against)
        if too_coarse(backend, some):
            return inapplicable("halves", backend, case, TOO_COARSE)
    merged = merge([_with_lse(backend, part) for part in parts])
    worst = judged("halves", backend, case, lambda orders: _merging(backend, whole, parts, merged, orders))
    return LawResult("halves", backend, case, "passed", worst)


def _merging(
    backend: str, whole: Inputs, parts: list[Inputs], merged: tuple[Tensor, Tensor], orders: int
) -> dict[str, float]:
    """Compute the errors of a merged result; each part may be one budget off, and so may its lse."""
    if format_of(backend):
        # An average over half the keys is larger: the errors of the parts add up to sqrt(2) budgets of the whole, and
        # the errors of their weights to the same again.
        loose = norm_bounds(whole)
        return {"out": loose["out"].excess(merged[0], slack=3.0), "lse": loose["lse"].excess(merged[1])}
    known = bounds(whole, orders=orders)
    lse, out = known["lse"].truth, known["out"].truth
    lost, moved, worst = torch.zeros_like(lse), torch.zeros_like(out), torch.zeros_like(out)
    for part in parts:
        own = bounds(part, orders=orders)
        part_lse = own["lse"].truth
        weight = torch.where(part_lse == -math.inf, 0.0, torch.exp(part_lse - lse.nan_to_num(0.0, 0.0, 0.0)))
        rounding = own["lse"].allowed * weight
        lost += rounding
        moved += rounding.transpose(1, 2).unsqueeze(-1) * (own["out"].truth - out).abs()
        worst += weight.transpose(1, 2).unsqueeze(-1) * own["out"].allowed
    allowed = known["out"].allowed + worst + moved.amax((1, 3), keepdim=True)
    return {
        "out": Bound(out, allowed).excess(merged[0]),
        "lse": Bound(lse, known["lse"].allowed + lost.amax(2, keepdim=True)).excess(merged[1]),
    }


def _with_lse(backend: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = inputs.attend(backend)
    assert lse is not None
    return out, lse


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over parts of the keys, in float64: out (B, S, H, D) and lse (B, H, S)."""
    lses = torch.stack([lse.double() for _, lse in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.where(lse == -math.inf, 0.0, torch.exp(lses - torch.where(lse == -math.inf, 0.0, lse)))
    out = sum(
        (weight.transpose(1, 2).unsqueeze(-1) * out.double() for weight, (out, _) in zip(weights, parts, strict=True)),
        torch.zeros((), dtype=torch.float64, device=lse.device),
    )
    return out, lse


def _keys(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return the inputs with only some keys, and the mask for those."""
    axis = 1 if inputs.case.layout == "BSHD" else 2
    case, mask = inputs.case, inputs.mask
    alone = mask is not None and mask.pattern is None and mask.dense is None and mask.block is None
    if mask is not None and mask.key is not None and alone:
        keys = key_mask(mask.key, case.seqlen_kv)[:, 0, 0, start:stop]
        mask = Mask(key=keys.expand(case.batch, -1).contiguous())
    elif mask is not None:
        sizes = (case.batch, case.heads, case.seqlen_q, case.seqlen_kv)
        allowed = reference.allowed_positions(mask, *sizes)
        dense = mask.dense
        if dense is not None and dense.dtype != torch.bool:
            dense = torch.where(allowed, dense, -math.inf)
        else:
            dense = allowed
        mask = Mask(dense=dense[..., start:stop].contiguous().to(inputs.query.device))
    return inputs.replace(
        case=case.replace(seqlen_kv=stop - start),
        key=inputs.key.narrow(axis, start, stop - start),
        value=inputs.value.narrow(axis, start, stop - start),
        mask=mask,
    )
