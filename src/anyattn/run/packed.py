"""Run a packed call: as it is if the kernel takes packed sequences, else padded and packed again."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn.backend.protocol import Output, Parts, Plan, Run
from anyattn.call.facts import Lengths
from anyattn.lowering import packed_rows
from anyattn.run.plan import execute
from anyattn.types.spec import AttentionSpec


def run_packed(
    plan: Plan, run: Run, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, sinks: Tensor | None
) -> Output:
    """Run a plan on a packed call; tokens that see no key get zeros, lse -inf and no gradients.

    Args:
        plan: What was decided; its spec is packed if the kernel takes packed sequences.
        run: The backend's function.
        query: `(T_q, H, D)`.
        key: `(T_k, H_kv, D)`.
        value: `(T_k, H_kv, D_v)`.
        lengths: As for `attention_varlen`.
        sinks: `(H,)`, or None.
    """
    cu_q, cu_k, max_q, max_k = lengths
    if 0 in (query.shape[0], key.shape[0]) or plan.lowering.entry == "empty":
        return _nothing_to_see(plan.spec, query, key, value, sinks)
    if plan.spec.packed:
        starts = cu_q.contiguous()
        other = starts if cu_k is cu_q else cu_k.contiguous()
        chosen = run if packed_rows.reads_lengths(plan) else packed_rows.with_zeros(run)
        return execute(chosen, plan, query, key, value, Parts(sinks=sinks, cu_seqlens_q=starts, cu_seqlens_k=other))
    starts_q, starts_k = cu_q.long(), cu_k.long()
    lengths_k = starts_k.diff()
    parts = Parts(key=lengths_k, sinks=sinks)
    if plan.spec.mask.dense is not None:
        parts = Parts(dense=_positions(plan.spec, starts_q.diff(), lengths_k, max_q, max_k), sinks=sinks)
    padded = [
        _unpacked(tensor, starts, most)
        for tensor, starts, most in ((query, starts_q, max_q), (key, starts_k, max_k), (value, starts_k, max_k))
    ]
    result = execute(run, plan, padded[0], padded[1], padded[2], parts)
    tokens = torch.arange(query.shape[0], device=query.device)
    # searchsorted needs values, which meta tensors don't have.
    sequence = tokens if query.is_meta else torch.searchsorted(starts_q, tokens, right=True) - 1
    # Tokens after the last sequence's end read place 0; chosen_rows sets them to zero.
    inside = tokens < starts_q[-1]
    place = torch.where(inside, tokens - starts_q[sequence], 0)
    sequence = sequence.clamp(max=starts_q.shape[0] - 2)
    out, lse = result if isinstance(result, tuple) else (result, None)
    packed = out[sequence, place]
    found = packed if lse is None else (packed, lse[sequence, :, place].t())
    done = packed_rows.chosen_rows(inside, found, sinks)
    return done if not isinstance(done, tuple) else (done[0], done[1].contiguous())


def _unpacked(tensor: Tensor, starts: Tensor, most: int) -> Tensor:
    """Pad packed sequences to `(B, S, H, D)` with zeros, since a NaN at a masked position would spread."""
    place = torch.arange(most, device=tensor.device)
    index = (starts[:-1, None] + place).clamp(max=tensor.shape[0] - 1)
    inside = place < starts.diff()[:, None]
    return torch.where(inside[:, :, None, None], tensor[index], 0)


def _positions(spec: AttentionSpec, lengths_q: Tensor, lengths_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Return the lower-right pattern of sequences of different lengths as a boolean mask `(B, 1, S_q, S_kv)`."""
    pattern = spec.packed_pattern
    assert pattern is not None
    row = torch.arange(max_q, device=lengths_q.device)[:, None] + (lengths_k - lengths_q)[:, None, None]
    column = torch.arange(max_k, device=lengths_q.device)
    allowed = column < lengths_k[:, None, None]
    if pattern.right != -1:
        allowed = allowed & (column <= row + pattern.right)
    if pattern.left != -1:
        allowed = allowed & (column >= row - pattern.left)
    return allowed[:, None]


def _nothing_to_see(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Output:
    """Compute a call without queries or keys: zeros, lse -inf (or the sinks), within the autograd graph."""
    group = spec.num_heads // spec.num_kv_heads
    scores = torch.einsum("thd,shd->hts", query, key[:0].repeat_interleave(group, 1))
    out = torch.einsum("hts,shd->thd", scores, value[:0].repeat_interleave(group, 1))
    if not spec.return_lse:
        return out
    lse = query.new_full((spec.num_heads, query.shape[0]), float("-inf"), dtype=torch.float32)
    if sinks is not None:
        lse = sinks.detach().float()[:, None].expand_as(lse).contiguous()
    return out, lse
