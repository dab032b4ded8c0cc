"""From a packed call to its spec."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyattn.call.facts import Facts, Lengths, MaskFacts, Options, facts_of, plain_options
from anyattn.call.readers import of_tensors
from anyattn.call.storage import rows_aligned, starts_on_16
from anyattn.errors import InvalidCallError
from anyattn.masks.objects import Mask
from anyattn.process import tracing
from anyattn.types.spec import UNKNOWN, AttentionSpec, Storage


def describe_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    attn_mask: Mask | None,
    sinks: Tensor | None,
    options: Options,
) -> AttentionSpec:
    """Return the spec of a packed call, with the sizes of its longest sequence.

    Raises:
        InvalidCallError: If no backend can take the call.
    """
    cu_q, cu_k, max_q, max_k = lengths
    options = plain_options(options)
    pattern = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Mask) or attn_mask.pattern is None or _holds_tensors(attn_mask):
            raise InvalidCallError(
                "attn_mask of attention_varlen must be masks.Causal or masks.SlidingWindow; "
                f"{attn_mask!r} was given. To mask other keys, leave them out of the packed tensors."
            )
        pattern = attn_mask.pattern
    records = tracing.records()
    batch = tracing.static_shape(cu_q)[0] - 1
    facts = (
        _packed_facts(query, batch, max_q),
        _packed_facts(key, batch, max_k),
        _packed_facts(value, batch, max_k),
    )
    seen = None if sinks is None else facts_of(sinks)
    # In a recorded graph one tensor may stand for two inputs.
    same = not records and cu_q is cu_k and max_q == max_k
    tensors = (query, key, value, sinks, cu_q, cu_k)
    storage = Storage()
    if not query.is_cpu:
        storage = Storage(
            aligned=all(rows_aligned(tensor) and starts_on_16(tensor) for tensor in (query, key, value)),
            unit_stride=all(tensor.stride(-1) == 1 for tensor in (query, key, value)),
        )
    spec = of_tensors(
        facts,
        MaskFacts(pattern),
        options,
        seen,
        tensors,
        storage=storage,
        same_lengths=same,
        compiled=records or tracing.is_fake(query),
    )
    return spec.replace(packed=True)


def _packed_facts(tensor: Tensor, batch: Any, most: Any) -> Facts:
    """Return a packed tensor's facts with the longest sequence's sizes; a recorded graph's lengths are UNKNOWN."""
    facts = facts_of(tensor)
    free = tracing.records()
    sizes = tuple(UNKNOWN if type(n) is not int or (free and n) else n for n in (batch, most))
    return facts._replace(shape=(*sizes, *(int(n) for n in facts.shape[1:])))


def _holds_tensors(mask: Mask) -> bool:
    return any(part is not None for part in (mask.key, mask.dense, mask.block))
