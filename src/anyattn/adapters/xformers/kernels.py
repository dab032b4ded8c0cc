"""The calls of xFormers' attention: dense, and packed with block-diagonal biases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.adapters._flash import KernelCall
from anyattn.backend.patterns import KernelPattern
from anyattn.backend.protocol import Parts, Plan
from anyattn.lowering import host_lengths
from anyattn.lowering.cache import cached
from anyattn.lowering.dense import aligned_bias, joined_mask, within_base_2
from anyattn.lowering.host_lengths import Sequences
from anyattn.lowering.lse import normalise_lse, with_huge_biases
from anyattn.sources.packages import FUNCTIONS


def attend(plan: Plan, call: KernelCall, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Call the kernel for a plan."""
    if plan.spec.packed:
        return _attend_packed(plan, call)
    functions = FUNCTIONS[plan.backend]
    query, key = call.query, call.key
    seqlen_q, seqlen_kv = query.shape[1], key.shape[1]
    mask, bias = None, _bias(functions, plan.lowering.pattern, seqlen_q, seqlen_kv)
    if plan.lowering.dense:
        mask = joined_mask(plan.spec, parts, seqlen_q, seqlen_kv, query.device, pattern=True)
        assert mask is not None
        bias = aligned_bias(within_base_2(mask), query.transpose(1, 2), key.transpose(1, 2), strict=True)
    out, lse = _call(plan, query, key, call.value, bias)
    if lse is not None:
        lse = normalise_lse(lse[..., :seqlen_q], mask)
        if mask is not None and mask.dtype in (torch.bfloat16, torch.float32):
            lse = with_huge_biases(lse, mask)
    return out, lse


def bound_to(plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """Return the function with a plan's constants, or None if a call has to be prepared."""
    spec, functions, pattern = plan.spec, FUNCTIONS[plan.backend], plan.lowering.pattern
    if spec.is_gqa or spec.return_lse or plan.lowering.entry != "flash":
        return None
    if pattern is not None and not (pattern.is_full or pattern.is_causal):
        return None  # a window's bias holds lengths
    bias = _bias(functions, pattern, spec.seqlen_q, spec.seqlen_kv)
    return functools.partial(functions.memory_efficient_attention, attn_bias=bias, p=spec.dropout_p, scale=spec.scale)


def _attend_packed(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    spec, starts_q, starts_k = plan.spec, call.cu_seqlens_q, call.cu_seqlens_kv
    assert starts_q is not None
    assert starts_k is not None

    def kernel(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor | None]:
        bias = _block_diagonal(plan, starts_q, starts_k, sequences)
        out, lse = _call(plan, query[None], key[None], value[None], bias)
        return out[0], None if lse is None else _packed_lse(lse, sequences)

    with_lse = spec.return_lse or plan.rescale
    return host_lengths.attend(spec, call.query, call.key, call.value, starts_q, starts_k, kernel, with_lse=with_lse)


def _block_diagonal(plan: Plan, starts_q: Tensor, starts_k: Tensor, sequences: Sequences) -> Any:
    """Make the bias object of packed sequences; its tensors are copied to the device once per tensor of lengths."""
    kind, device = FUNCTIONS[plan.backend].BlockDiagonalMask, starts_q.device

    def of_one(starts: Tensor, lengths: tuple[int, ...]) -> Any:
        return cached(starts, ("block diagonal", kind), lambda: kind.from_seqlens(list(lengths), device=device))

    if not sequences.whole:
        mask = kind.from_seqlens(list(sequences.lengths_q), list(sequences.lengths_k), device=device)
    else:
        mask = of_one(starts_q, sequences.lengths_q)
        if starts_k is not starts_q:
            other = of_one(starts_k, sequences.lengths_k)
            mask = kind(q_seqinfo=mask.q_seqinfo, k_seqinfo=other.q_seqinfo)
    pattern = plan.lowering.pattern
    if pattern is None or pattern.is_full:
        return mask
    if pattern.left == -1 or pattern.left >= plan.spec.seqlen_kv - 1:
        return mask.make_causal()
    return mask.make_local_attention(pattern.left + 1)  # which counts a row's own position


def _packed_lse(lse: Tensor, sequences: Sequences) -> Tensor:
    """Convert lse `(1, H, T_q)` to `(H, T_q)`.

    Up to 0.0.32 flash of an old torch returns `(sequences, H, longest)` (`VARLEN_LSE_PACKED` of `flash.py`).
    """
    if lse.shape[0] == 1:
        return lse[0, :, : sum(sequences.lengths_q)]
    return torch.cat([one[:, :length] for one, length in zip(lse, sequences.lengths_q, strict=True)], -1)


def _call(plan: Plan, query: Tensor, key: Tensor, value: Tensor, bias: Any) -> tuple[Tensor, Tensor | None]:
    """Return the output `(B, S_q, H, D_v)`, and lse with heads in one dimension, or None."""
    spec, functions = plan.spec, FUNCTIONS[plan.backend]
    query, key, value = _heads(plan, query, key, value)
    lse: Tensor | None = None
    if spec.needs_grad:
        out = functions.memory_efficient_attention(query, key, value, bias, spec.dropout_p, spec.scale)
    elif not (spec.return_lse or plan.rescale):
        out = functions.memory_efficient_attention_forward(query, key, value, bias, spec.dropout_p, spec.scale)
    if spec.return_lse or plan.rescale:
        with torch.no_grad():
            result = functions.memory_efficient_attention_forward_requires_grad(
                query.detach(), key.detach(), value.detach(), bias, 0.0, spec.scale
            )
        out = out if spec.needs_grad else result[0]
        lse = result[1]
    if out.dim() == 5:
        out = out.flatten(2, 3)
    if lse is not None and lse.dim() == 4:
        lse = lse.flatten(1, 2)
    return out, lse


def _bias(functions: Any, pattern: KernelPattern | None, seqlen_q: int, seqlen_kv: int) -> Any:
    """Make the bias object of a pattern; unbounded sides get their largest size."""
    if pattern is None or (pattern.left == -1 and pattern.right == -1):
        return None
    if pattern.left == -1 and pattern.right == 0:
        upper = pattern.align == "upper_left"
        return functions.LowerTriangularMask() if upper else functions.LowerTriangularFromBottomRightMask()
    left = seqlen_kv if pattern.left == -1 else pattern.left
    return functions.LocalAttentionFromBottomRightMask(left, seqlen_q if pattern.right == -1 else pattern.right)


def _heads(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group heads as `(B, S, H_kv, H / H_kv, D)` if the kernel takes that, else repeat them."""
    group = query.shape[2] // key.shape[2]
    if group == 1:
        if plan.lowering.entry == "cutlass":
            # CUTLASS misreads a stride of 0 along heads if the last tile has one query (torch's #191937).
            key, value = (tensor if tensor.stride(2) else tensor.contiguous() for tensor in (key, value))
        return query, key, value
    if plan.lowering.entry == "cutlass" or plan.spec.needs_grad:
        return query, key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    # A stride of 0 along query's heads would be read as one head.
    query = query if query.stride(2) else query.contiguous()
    query = query.view(*query.shape[:2], key.shape[2], group, query.shape[3])
    key, value = (tensor.unsqueeze(3).expand(-1, -1, -1, group, -1) for tensor in (key, value))
    return query, key, value
