"""Shorter ways to run calls that convert nothing: a kernel's constants are bound once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.backend.protocol import MaskedRunner, Output, Plan, Runner
from anyattn.lowering.key_layout import key_layout, to_front

Kernel = Callable[..., Any]
"""`kernel(query, key, value)`, or with lengths int32 `(B,)` as a fourth argument; tensors are `(B, S, H, D)`.

Returns the output or a tuple that begins with it; the second part is lse `(B, H, S_q)` if the plan needs it.
"""


def converts_nothing(plan: Plan) -> bool:
    """Whether query, key and value reach the kernel as they are, but for a transposed view."""
    spec, lowering, pattern = plan.spec, plan.lowering, plan.lowering.pattern
    if spec.packed or spec.sinks or spec.mask.dense is not None or spec.mask.block is not None or plan.rescale:
        return False
    if lowering.copy or lowering.dense or lowering.head_dims != (spec.head_dim, spec.head_dim_v):
        return False
    return pattern is None or (pattern.rows is None and pattern.keys is None)


def bind(plan: Plan, kernel: Kernel) -> Runner | None:
    """Return the shortest function for a call without a key mask, or None if the call isn't one.

    Args:
        plan: The call.
        kernel: Takes `(query, key, value)`; its other arguments are bound.
    """
    if plan.spec.mask.key is not None or not converts_nothing(plan):
        return None
    if plan.spec.return_lse:
        return _with_lse(plan, kernel)
    if plan.spec.layout == "BSHD":

        def run(query: Tensor, key: Tensor, value: Tensor) -> Output:
            found = kernel(query, key, value)
            return found[0] if type(found) is tuple or type(found) is list else found  # type: ignore[no-any-return]

        return run

    def swapped(query: Tensor, key: Tensor, value: Tensor) -> Output:
        found = kernel(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        out: Tensor = found[0] if type(found) is tuple or type(found) is list else found
        return out.transpose(1, 2)

    return swapped


def _with_lse(plan: Plan, kernel: Kernel) -> Runner:
    swap = plan.spec.layout == "BHSD"

    def run(query: Tensor, key: Tensor, value: Tensor) -> Output:
        if swap:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out, lse = kernel(query, key, value)[:2]
        return out.transpose(1, 2) if swap else out, finished_lse(lse)

    return run


def finished_lse(lse: Tensor) -> Tensor:
    """Return a kernel's lse detached, in float32, with -inf for rows without a key; some kernels write +inf there."""
    lse = lse.detach().float()
    return torch.where(lse == float("inf"), float("-inf"), lse)


def bind_lengths(plan: Plan, kernel: Kernel) -> MaskedRunner | None:
    """Return the shortest function for a call with a key mask that a kernel takes as lengths, or None.

    Args:
        plan: The call.
        kernel: Takes `(query, key, value, lengths)`; its other arguments are bound.
    """
    spec, keys = plan.spec, plan.lowering.keys
    if keys not in ("lengths", "front") or spec.mask.key is None or spec.return_lse or spec.needs_grad:
        return None
    if not converts_nothing(plan):
        return None
    prefix, swap = keys == "lengths", spec.layout == "BHSD"

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Output:
        if swap:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mask: Tensor = attn_mask if isinstance(attn_mask, Tensor) else attn_mask.key
        layout = key_layout(mask, key.shape[0], key.shape[1], prefix=prefix, grad=False)
        if layout.order is not None:
            key, value = to_front(layout, key, value, grad=False)
        found = kernel(query, key, value, layout.lengths)
        out: Tensor = found[0] if type(found) is tuple or type(found) is list else found
        return out.transpose(1, 2) if swap else out

    return run


def without_mask(bound: Runner | None) -> MaskedRunner | None:
    """Return a runner for calls with a mask that the bound call has among its constants, such as a causal one."""
    if bound is None:
        return None
    run = bound
    return lambda query, key, value, attn_mask: run(query, key, value)
