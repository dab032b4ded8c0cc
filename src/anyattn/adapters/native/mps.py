"""SDPA on Apple GPUs: how `native` avoids the known-bad rows there.

Source: the rows of `anyattn.backend.known_bad.mps`. Most are avoided by contiguous query, key and value, a full-size
contiguous mask, and never the causal flag. The others are written out in float32, or refused. None of this was run on
an Apple GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from anyattn.backend.known_bad.table import hits
from anyattn.backend.protocol import Lowering
from anyattn.environment import Environment
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

_FLAG = frozenset(("mps-causal-half", "mps-mask-and-causal"))
_WRITTEN_OUT = frozenset(("mps-vector", "mps-value-dim", "mps-long-half"))
_REFUSED = frozenset(("mps-4g",))


def known_bad(spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
    """Yield the rows that `lower` doesn't avoid. Law: pure."""
    return (row.reason() for row in hits(("native",), spec, env) if row.name in _REFUSED)


def lower(plain: Lowering, spec: AttentionSpec, env: Environment) -> Lowering:
    """Change how a call reaches SDPA if it would be wrong. Law: pure, and exact."""
    rows = hits(("native",), spec, env)
    if not rows:
        return plain
    names = {row.name for row in rows}
    why = "; ".join(f"{row.what} for {row.when} ({row.link})" for row in rows)
    notes = list(plain.conversions)
    if names & _WRITTEN_OUT:
        notes.append(Conversion("steered", f"written out in float32: {why}"))
        return dataclasses.replace(plain, entry="written_out", is_causal=False, conversions=tuple(notes))
    is_causal = plain.is_causal and not names & _FLAG
    if is_causal != plain.is_causal:
        notes.append(Conversion("dense_mask", f"causal given as a dense mask: {why}"))
    notes.append(Conversion("copy", f"query, key and value contiguous, and the mask at its full size: {why}"))
    return dataclasses.replace(plain, copy=True, is_causal=is_causal, conversions=tuple(notes))
