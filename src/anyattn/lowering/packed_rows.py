"""Which tokens of a packed call belong to a sequence that sees something, and what the others get: zeros.

Tensors may hold more tokens than the cumulative lengths tell of, as a buffer of fixed size does. No kernel says what it
writes there, nor for sequences without queries or keys: outputs and gradients may be memory that nobody wrote. So they
are chosen on the device, without reading a length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn.backend.protocol import Output, Parts, Plan, Run
from anyattn.lowering.cache import kept


def used(starts: Tensor, other: Tensor, total: int) -> Tensor:
    """Say of each token whether it is in a sequence that has tokens on the other side too: boolean `(total,)`.

    Args:
        starts: int32 `(B + 1,)`: where each sequence begins, B > 0.
        other: The same of the other side; the same object where the lengths are the same.
        total: How many tokens there are, those after the last sequence included.
    """
    if other is starts:
        return kept(starts, ("inside", total), lambda: _inside(starts, total)[0])  # type: ignore[no-any-return]
    inside, tokens = _inside(starts, total)
    sequence = torch.searchsorted(starts, tokens, right=True).sub_(1).clamp_(max=len(starts) - 2)
    return inside & (other.diff() > 0)[sequence]


def _inside(starts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(total, device=starts.device, dtype=starts.dtype)
    return tokens < starts[-1], tokens


def reads_lengths(plan: Plan) -> bool:
    """Whether the adapter has the lengths on the host, so that its kernel is given no token without a sequence."""
    return any(note.code in ("host_lengths", "synchronises") for note in plan.lowering.conversions)


def with_zeros(run: Run) -> Run:
    """Make a backend's packed call give zeros, lse -inf and no gradients where a token sees nothing.

    Such tokens are zeros for the kernel too: some load a tile of keys that reaches beyond the last sequence, where a
    weight of 0 times NaN is NaN, and others scale by the largest number that there is.
    """

    def chosen(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        starts_q, starts_k = parts.cu_seqlens_q, parts.cu_seqlens_k
        assert starts_q is not None
        assert starts_k is not None
        rows, keys = used(starts_q, starts_k, query.shape[0]), used(starts_k, starts_q, key.shape[0])
        query = torch.where(rows[:, None, None], query, 0)
        key, value = (torch.where(keys[:, None, None], tensor, 0) for tensor in (key, value))
        # A backend that is given sinks by rescaling has them in no lse yet.
        sinks = None if plan.rescale else parts.sinks
        return chosen_rows(rows, run(plan, query, key, value, parts), sinks)

    return chosen


def chosen_rows(rows: Tensor, result: Output, sinks: Tensor | None) -> Output:
    """Give a result with zeros, and the lse of a row without a key, in the rows `(T_q,)` that aren't chosen.

    Args:
        rows: Boolean `(T_q,)`.
        result: The output `(T_q, H, D_v)`, or a pair of it and the lse `(T_q, H)`.
        sinks: `(H,)` where the lse counts them: they are the lse of a row without a key. None is -inf.
    """
    out, lse = result if isinstance(result, tuple) else (result, None)
    out = torch.where(rows[:, None, None], out, 0)
    if lse is None:
        return out
    return out, torch.where(rows, lse, float("-inf") if sinks is None else sinks.detach().to(lse.dtype)[:, None])
