"""Shared code for flash-attn and similar kernels: it converts a call to their arguments, and their results back.

They take `(B, S, H, D)`, causal and windowed patterns in one alignment, and key masks as lengths. Every conversion is
exact: fully masked rows and keys are left out, allowed keys are moved, head_dim is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.adapters._flash.bound import finished_lse
from anyattn.backend.capabilities import Capabilities, kernel_pattern
from anyattn.backend.patterns import KernelPattern
from anyattn.backend.protocol import Lowering, Output, Parts, Plan
from anyattn.lowering.key_layout import key_layout, packed_keys, to_front, to_packed
from anyattn.lowering.storage import realigned
from anyattn.types.reasons import Conversion
from anyattn.types.spec import AttentionSpec

DECLARED = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16)),
    head_dim_max=256,
    causal=frozenset(("lower_right",)),
    window=frozenset(("lower_right",)),
    realigns=True,
    key_mask=True,
    dead_rows=True,
    gqa=True,
    lse=True,
    backward=True,
    deterministic=True,
    exact=True,
    unit_stride=False,
    # Launch grids hold batch and heads in their y and z (flash_fwd_launch_template.h).
    batch_max=65535,
    varlen=True,
    device_guard=True,
)
"""What most of them take; each adapter changes the fields that differ."""

FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
"""The names of the two functions in every generation of FlashAttention, and in kernels modelled on it."""


class KernelCall(NamedTuple):
    """What a kernel is called with, besides the plan.

    Attributes:
        query: `(B, S_q, H, D)`, or `(B * S_q, H, D)` if `cu_seqlens_kv` is given.
        key: `(B, S_kv, H_kv, D)`, or `(B * S_kv, H_kv, D)`.
        value: As key, with D_v.
        left: Columns before a row's own position, or -1.
        right: Columns after it, or -1.
        lengths: int32 `(B,)`: the number of keys of each batch entry, or None.
        cu_seqlens_q: int32 `(B + 1,)`, or None.
        cu_seqlens_kv: int32 `(B + 1,)`, or None.
        max_seqlen_q: S_q.
        max_seqlen_kv: S_kv.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    left: int
    right: int
    lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_kv: Tensor | None
    max_seqlen_q: int
    max_seqlen_kv: int


Kernel = Callable[[Plan, KernelCall], tuple[Tensor, Tensor | None]]
"""Returns the output in query's layout, and the natural lse `(B, H, S_q)` or `(H, B * S_q)`, or None."""


def lower(
    entry: str,
    caps: Capabilities,
    spec: AttentionSpec,
    *,
    packs: bool = False,
    head_dim_multiple: int = 8,
    same_head_dims: bool = False,
) -> Lowering:
    """Return how a call reaches a kernel of this kind.

    Args:
        entry: The name of the kernel's function.
        caps: The backend's declaration.
        spec: The call.
        packs: Whether key masks are passed as cumulative lengths of packed keys, for a kernel without lengths.
        head_dim_multiple: head_dim and head_dim_v are padded to multiples of this.
        same_head_dims: Whether the smaller of them is padded to the larger.
    """
    notes: list[Conversion] = []
    copy = not (spec.storage.aligned and spec.storage.unit_stride)
    if copy:
        text = "query, key and value copied: the kernel needs 16-byte aligned rows and a contiguous head_dim"
        notes.append(Conversion("copy", text))
    dim, dim_v = (-(-size // head_dim_multiple) * head_dim_multiple for size in (spec.head_dim, spec.head_dim_v))
    if same_head_dims:
        dim = dim_v = max(dim, dim_v)
    if (dim, dim_v) != (spec.head_dim, spec.head_dim_v):
        what = f"head_dim padded to {dim}" if dim == dim_v else f"head_dim and head_dim_v padded to {dim} and {dim_v}"
        notes.append(Conversion("pad_head_dim", f"{what}, with zeros"))
    pattern = kernel_pattern(caps, spec)
    asked = spec.mask.pattern
    if pattern is not None and asked is not None and not spec.same_lengths and pattern.align != asked.align:
        text = f"the pattern passed as ({pattern.left}, {pattern.right}) in {pattern.align} alignment"
        cut = [f", {what} {part} only" for what, part in (("rows", pattern.rows), ("keys", pattern.keys)) if part]
        notes.append(Conversion("realigned", text + "".join(cut)))
    keys = ""
    if spec.mask.key is not None:
        keys = "packed" if packs else "lengths" if spec.mask.prefix else "front"
        how = {
            "packed": "key mask: the allowed keys are packed, and passed with cumulative lengths",
            "lengths": "key mask: passed as lengths",
            "front": "key mask: the allowed keys are moved to the front, and passed with lengths",
        }
        notes.append(Conversion(f"keys_{keys}", how[keys]))
    head_dims, conversions = (dim, dim_v), tuple(notes)
    return Lowering(entry, copy=copy, pattern=pattern, keys=keys, head_dims=head_dims, conversions=conversions)  # type: ignore[arg-type]


def keys_left(spec: AttentionSpec, pattern: KernelPattern) -> int:
    """Return the number of keys that a pattern leaves."""
    return spec.seqlen_kv if pattern.keys is None else pattern.keys[1] - pattern.keys[0]


def attend(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts, kernel: Kernel) -> Output:
    """Run a lowered call: convert its arguments, call the kernel, and convert the results back."""
    spec, lowering = plan.spec, plan.lowering
    if spec.layout == "BHSD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if lowering.copy:
        query, key, value = realigned(query), realigned(key), realigned(value)
    head_dim_v = value.shape[-1]
    assert lowering.head_dims is not None
    dim, dim_v = lowering.head_dims
    query, key, value = _padded(query, dim), _padded(key, dim), _padded(value, dim_v)
    if spec.packed:
        return _attend_packed(plan, query, key, value, parts, kernel, head_dim_v)
    pattern = lowering.pattern
    seqlen_q = query.shape[1]
    if pattern is not None and pattern.rows is not None:
        query = query[:, pattern.rows[0] : pattern.rows[1]]
    if pattern is not None and pattern.keys is not None:
        key, value = (tensor[:, pattern.keys[0] : pattern.keys[1]] for tensor in (key, value))
    left, right = (-1, -1) if pattern is None else (pattern.left, pattern.right)
    out, lse = kernel(plan, _call(plan, query, key, value, parts, left, right))
    if lowering.keys == "packed":
        batch, seqlen, heads = query.shape[0], query.shape[1], query.shape[2]
        out = out.view(batch, seqlen, heads, -1)
        lse = None if lse is None else lse.view(heads, batch, seqlen).transpose(0, 1)
    out = out[..., :head_dim_v] if out.shape[-1] != head_dim_v else out
    if pattern is not None and pattern.rows is not None:
        before, after = pattern.rows[0], seqlen_q - pattern.rows[1]
        out = F.pad(out, (0, 0, 0, 0, before, after))
        if lse is not None and parts.sinks is not None and not plan.rescale:
            # The kernel's lse includes the sinks; for a row without a key it is the sink itself.
            alone = parts.sinks.detach().to(lse.dtype)[None, :, None].expand(lse.shape[0], -1, before + after)
            lse = torch.cat((alone[..., :before], lse, alone[..., before:]), -1)
        elif lse is not None:
            lse = F.pad(lse, (before, after), value=float("-inf"))
    if spec.layout == "BHSD":
        out = out.transpose(1, 2)
    return _with_lse(plan, out, lse)


def _with_lse(plan: Plan, out: Tensor, lse: Tensor | None) -> Output:
    if not (plan.spec.return_lse or plan.rescale):
        return out
    if lse is None:
        raise AssertionError(f"{plan.backend} returned no lse")
    return out, finished_lse(lse)


def _attend_packed(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts, kernel: Kernel, head_dim_v: int
) -> Output:
    spec, pattern = plan.spec, plan.lowering.pattern
    left, right = (-1, -1) if pattern is None else (pattern.left, pattern.right)
    starts_q, starts_k = parts.cu_seqlens_q, parts.cu_seqlens_k
    call = KernelCall(query, key, value, left, right, None, starts_q, starts_k, spec.seqlen_q, spec.seqlen_kv)
    out, lse = kernel(plan, call)
    out = out[..., :head_dim_v] if out.shape[-1] != head_dim_v else out
    return _with_lse(plan, out, lse)


def _call(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts, left: int, right: int) -> KernelCall:
    mode = plan.lowering.keys
    batch, seqlen_q, seqlen_kv = query.shape[0], query.shape[1], key.shape[1]
    if not mode or parts.key is None:
        return KernelCall(query, key, value, left, right, None, None, None, seqlen_q, seqlen_kv)
    grad = "key" in plan.spec.requires_grad or "value" in plan.spec.requires_grad
    if mode == "packed":
        packed = packed_keys(parts.key, batch, seqlen_kv)
        key, value = to_packed(packed, key, value, grad=grad)
        starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * seqlen_q
        flat = query.flatten(0, 1)
        return KernelCall(flat, key, value, left, right, None, starts, packed.cu_seqlens, seqlen_q, seqlen_kv)
    layout = key_layout(parts.key, batch, seqlen_kv, prefix=mode == "lengths", grad=grad)
    key, value = to_front(layout, key, value, grad=grad)
    return KernelCall(query, key, value, left, right, layout.lengths, None, None, seqlen_q, seqlen_kv)


def _padded(tensor: Tensor, dim: int) -> Tensor:
    return F.pad(tensor, (0, dim - tensor.shape[-1])) if tensor.shape[-1] != dim else tensor
