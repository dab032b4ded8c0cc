"""Zeros for the tokens of a packed call that have nothing to attend to.

Tensors may hold more tokens than the cumulative lengths cover, as a buffer of fixed size does. No kernel documents what
it writes for those tokens, nor for sequences without queries or keys: outputs and gradients may be uninitialised
memory. So they are replaced on the device, without reading a length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn.backend.protocol import Output, Parts, Plan, Run
from anyattn.lowering.cache import cached


def used(starts: Tensor, other: Tensor, total: int) -> Tensor:
    """Compute which tokens are in a sequence that has both queries and keys: boolean `(total,)`.

    Args:
        starts: int32 `(B + 1,)`: the index at which each sequence begins, B > 0.
        other: The same for keys if `starts` is for queries, or the reverse; the same object if the lengths are equal.
        total: The number of tokens, including those after the last sequence.
    """
    if other is starts:
        return cached(starts, ("inside", total), lambda: _inside(starts, total)[0])
    inside, tokens = _inside(starts, total)
    sequence = torch.searchsorted(starts, tokens, right=True).sub_(1).clamp_(max=len(starts) - 2)
    return inside & (other.diff() > 0)[sequence]


def _inside(starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(total, device=starts.device, dtype=starts.dtype)
    return tokens < starts[-1], tokens


def reads_lengths(plan: Plan) -> bool:
    """Whether the adapter reads the lengths on the host, so its kernel gets no token without a sequence."""
    return any(note.code in ("host_lengths", "synchronises") for note in plan.lowering.conversions)


def with_zeros(run: Run) -> Run:
    """Wrap a backend's packed call: tokens with nothing to attend to get zeros, lse -inf and no gradients.

    The kernel gets zeros for such tokens too. Some kernels load a tile of keys that reaches beyond the last sequence,
    and a weight of 0 times NaN is NaN; others scale by the largest number in the tensor.
    """

    def chosen(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        starts_q, starts_k = parts.cu_seqlens_q, parts.cu_seqlens_k
        assert starts_q is not None
        assert starts_k is not None
        rows, keys = used(starts_q, starts_k, query.shape[0]), used(starts_k, starts_q, key.shape[0])
        query = torch.where(rows[:, None, None], query, 0)
        key, value = (torch.where(keys[:, None, None], tensor, 0) for tensor in (key, value))
        # If sinks are added later by rescaling, the backend's lse doesn't hold them yet.
        sinks = None if plan.rescale else parts.sinks
        return chosen_rows(rows, run(plan, query, key, value, parts), sinks)

    return chosen


def chosen_rows(rows: Tensor, result: Output, sinks: Tensor | None) -> Output:
    """Replace the rows of a result that aren't chosen by zeros and by the lse of a row without a key.

    Args:
        rows: Boolean `(T_q,)`: the rows that are chosen.
        result: The output `(T_q, H, D_v)`, or a pair of it and the lse `(T_q, H)`.
        sinks: `(H,)` if the lse includes them: they are the lse of a row without a key. None is -inf.
    """
    out, lse = result if isinstance(result, tuple) else (result, None)
    out = torch.where(rows[:, None, None], out, 0)
    if lse is None:
        return out
    return out, torch.where(rows, lse, float("-inf") if sinks is None else sinks.detach().to(lse.dtype)[:, None])
