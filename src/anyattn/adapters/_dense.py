"""Shared code for kernels that take one dense mask beside a causal flag: torch_xla's and torch_npu's.

Such a kernel's output for a row without a key is unspecified or not zero. These rows are found from the mask, and their
output is set to zero here, which also stops their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.backend.capabilities import Capabilities, kernel_pattern, needs_dense
from anyattn.backend.patterns import trimmed
from anyattn.backend.protocol import Lowering, Output, Parts, Plan
from anyattn.lowering.dense import joined_mask, mask_conversions
from anyattn.lowering.storage import realigned
from anyattn.masks.values import live_rows
from anyattn.types.reasons import Conversion
from anyattn.types.spec import AttentionSpec


class KernelCall(NamedTuple):
    """What a kernel is called with, besides the plan.

    Attributes:
        query: In the spec's layout; only the rows that a pattern leaves.
        key: Likewise; only the keys that a pattern leaves.
        value: As key.
        mask: Boolean (True = attend) or floating (added), four dimensions, each full or 1; or None.
        live: Boolean `(B or 1, H or 1, S_q or 1)`: the mask's rows that have a key; None if all have.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    live: Tensor | None


Kernel = Callable[[Plan, KernelCall], tuple[Tensor, Tensor | None]]
"""Returns the output in the spec's layout, and the natural lse `(B, H, S_q)` or None."""


def lower(entry: str, caps: Capabilities, spec: AttentionSpec, *, copies: bool = True) -> Lowering:
    """Return how a call reaches a kernel of this kind.

    Args:
        entry: The name of the kernel's function.
        caps: The backend's declaration.
        spec: The call.
        copies: Whether the kernel needs contiguous, aligned storage.
    """
    notes = list(mask_conversions(caps, spec))
    copy = copies and not (spec.storage.aligned and spec.storage.unit_stride)
    if copy:
        notes.append(Conversion("copy", "query, key and value copied to contiguous, aligned storage"))
    if spec.mask.dead_rows and (spec.mask.dense is not None or spec.mask.key is not None):
        notes.append(Conversion("dead_rows", "rows that the mask leaves without a key are set to zero"))
    if spec.mask.dense is not None or needs_dense(caps, spec):
        return Lowering(entry, dense=True, copy=copy, conversions=tuple(notes))
    pattern = kernel_pattern(caps, spec)
    if pattern is not None:
        pattern = trimmed(pattern, spec.seqlen_q, spec.seqlen_kv)
        cut = [f"{what} {part} only" for what, part in (("rows", pattern.rows), ("keys", pattern.keys)) if part]
        if cut:
            notes.append(Conversion("trimmed", "fully masked rows and keys aren't computed: " + ", ".join(cut)))
    is_causal = pattern is not None and pattern.is_causal
    return Lowering(entry, is_causal=is_causal, copy=copy, pattern=pattern, conversions=tuple(notes))


def attend(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts, kernel: Kernel) -> Output:
    """Run a lowered call: cut rows and keys, join the mask, call the kernel, and set rows without a key to zero."""
    spec, lowering = plan.spec, plan.lowering
    axis = 1 if spec.layout == "BSHD" else 2
    if lowering.copy:
        query, key, value = realigned(query), realigned(key), realigned(value)
    seqlen_q, seqlen_kv = query.shape[axis], key.shape[axis]
    mask = live = None
    if lowering.dense:
        mask = joined_mask(spec, parts, seqlen_q, seqlen_kv, query.device, pattern=True)
        if mask is not None and spec.mask.dead_rows:
            live = live_rows(mask)
    rows = keys = None
    if lowering.pattern is not None:
        rows, keys = lowering.pattern.rows, lowering.pattern.keys
    if rows is not None:
        query = query.narrow(axis, rows[0], rows[1] - rows[0])
    if keys is not None:
        key, value = (tensor.narrow(axis, keys[0], keys[1] - keys[0]) for tensor in (key, value))
    out, lse = kernel(plan, KernelCall(query, key, value, mask, live))
    if live is not None:
        wide = live.unsqueeze(-1)
        out = torch.where(wide.transpose(1, 2) if axis == 1 else wide, out, 0)
        lse = None if lse is None else torch.where(live, lse, float("-inf"))
    if rows is not None:
        before, after = rows[0], seqlen_q - rows[1]
        out = F.pad(out, (0, 0, 0, 0, before, after) if axis == 1 else (0, 0, before, after))
        lse = None if lse is None else F.pad(lse, (before, after), value=float("-inf"))
    if not (spec.return_lse or plan.rescale):
        return out
    if lse is None:
        raise AssertionError(f"{plan.backend} returned no lse")
    return out, lse.detach().float()
