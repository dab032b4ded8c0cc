"""The call of `sageattn_varlen`, without the packed sequences that it may compute wrong.

Source: `sageattention/triton/quant_per_block_varlen.py`, `attn_qk_int8_block_varlen.py` and
`attn_qk_int8_per_block_causal_varlen.py` of SageAttention 2.1.1 to 2.2.0. It waits for the device to size an
allocation, so reading the lengths before costs little. They are needed for this:

- Sequences without queries or keys are left out, since its result for them is undocumented. Their rows are zeros.
- It subtracts the mean of all its keys from each, so keys that belong to no sequence are left out.
- Its causal loop goes by queries, in tiles of 128, and reads the scales of as many keys (one for 64 of them). These may
  be other sequences' scales, or memory beyond the last one's end. That may be NaN, and is multiplied by the scores
  before they are masked. So rows after a sequence's last key, which see all its keys, are computed by a second call
  that isn't causal. Then the last sequence may lack one scale, and if it does a sequence of a single token is added
  after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyattn.adapters._flash import KernelCall
from anyattn.adapters.sage.kernels import SAGEATTENTION, readable, what_lacks
from anyattn.backend.protocol import Plan
from anyattn.sources.packages import FUNCTIONS

ENTRY = "sageattn_varlen"
PARAMETERS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "is_causal", "sm_scale")
"""The keywords that are passed; nothing is left to `**kwargs`."""

_ROWS, _KEYS = 128, 64
"""How many queries and how many keys share a scale."""

_Span = tuple[int, int]
_Pair = tuple[_Span, _Span]
"""A sequence: its first row and the end of its rows, and the same for its keys."""


def entry_of(module: Any) -> Callable[..., Any]:
    """Return a package's function for packed sequences; if it has none, a function that raises."""
    found = getattr(module, ENTRY, None)
    text = f"This sageattention has no function {ENTRY}. {SAGEATTENTION.command}"
    if callable(found):
        text = what_lacks(found, ENTRY, PARAMETERS)
        if not text:
            return found  # type: ignore[no-any-return]

    def absent(*tensors: Tensor, **options: object) -> Any:
        raise RuntimeError(text)

    return absent


def call_packed(plan: Plan, call: KernelCall) -> tuple[Tensor, None]:
    """Attend over packed sequences, `(T, H, D)`; there is no lse."""
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_kv is not None
    starts: list[list[int]] = torch.stack((call.cu_seqlens_q, call.cu_seqlens_kv)).tolist()
    pairs = zip(*(itertools.pairwise(ends) for ends in starts), strict=True)
    seen: list[_Pair] = [pair for pair in pairs if all(start < stop for start, stop in pair)]
    causal = call.left == -1 and call.right == 0
    beyond: list[_Pair] = []
    if causal:
        seen, beyond = _causal_part(seen), _part_beyond(seen)
    out = call.query.new_zeros(call.query.shape)
    for group, flag in ((seen, causal), (beyond, False)):
        if not group:
            continue
        place = _place([rows for rows, _ in group], out.device)
        found = _attend(plan, call, group, causal=flag)
        if len(found) == len(out):
            return found, None
        out[place] = found
    return out, None


def _causal_part(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return each sequence without the rows after its last key."""
    return [((rows[0], min(rows[1], rows[0] + keys[1] - keys[0])), keys) for rows, keys in pairs]


def _part_beyond(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return the rows after each sequence's last key, which see all of its keys."""
    lengths = [(rows, keys, keys[1] - keys[0]) for rows, keys in pairs]
    return [((rows[0] + count, rows[1]), keys) for rows, keys, count in lengths if rows[1] - rows[0] > count]


def _attend(plan: Plan, call: KernelCall, pairs: list[_Pair], *, causal: bool) -> Tensor:
    (start, stop), (first, last) = pairs[-1]
    guarded = causal and -(-(stop - start) // _ROWS) * _ROWS // _KEYS > -(-(last - first) // _KEYS)
    if guarded:
        row, key = pairs[0][0][0], pairs[0][1][0]
        pairs = [*pairs, ((row, row + 1), (key, key + 1))]
    device = call.query.device
    of_rows, of_keys = [rows for rows, _ in pairs], [keys for _, keys in pairs]
    rows, keys = _place(of_rows, device), _place(of_keys, device)
    query = call.query[rows]
    result: Any = FUNCTIONS[plan.backend].varlen(
        readable(query),
        readable(call.key[keys]),
        readable(call.value[keys]),
        cu_seqlens_q=_starts(of_rows, device),
        cu_seqlens_k=_starts(of_keys, device),
        max_seqlen_q=max(stop - start for start, stop in of_rows),
        max_seqlen_k=max(stop - start for start, stop in of_keys),
        is_causal=causal,
        sm_scale=plan.spec.scale,
    )
    if not isinstance(result, Tensor) or result.shape != query.shape:
        got = f"{tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise RuntimeError(f"{ENTRY} returned {got} for a query of {tuple(query.shape)}")
    return result[:-1] if guarded else result


def _place(spans: Sequence[_Span], device: torch.device) -> slice | Tensor:
    """Return a slice if each span begins at the end of the one before, else an index."""
    if all(one[1] == other[0] for one, other in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(*span) for span in spans]).to(device)


def _starts(spans: Sequence[_Span], device: torch.device) -> Tensor:
    ends = itertools.accumulate((stop - start for start, stop in spans), initial=0)
    return torch.tensor(list(ends), dtype=torch.int32, device=device)
