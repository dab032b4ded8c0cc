"""The known-bad rows of Apple GPUs, from public reports; none was reproduced on one.

Some version ranges are inferred from the dates of the reports and of their fixes.
"""

from __future__ import annotations

from anyattn.backend.known_bad.row import KnownBad
from anyattn.types.spec import UNKNOWN, AttentionSpec

_PYTORCH = "https://github.com/pytorch/pytorch"


def _half(spec: AttentionSpec) -> bool:
    return spec.dtype.itemsize == 2


def _masked(spec: AttentionSpec) -> bool:
    return spec.mask.key is not None or spec.mask.dense is not None


def _maybe(size: int, holds: bool) -> bool:
    return size == UNKNOWN or holds


_MPS = ("native", "native_math")


def _few_queries(spec: AttentionSpec) -> bool:
    return _maybe(spec.seqlen_q, spec.seqlen_q <= 8)


def _mps_vector(spec: AttentionSpec) -> bool:
    dims = spec.head_dim in (64, 96, 128) and spec.head_dim_v == spec.head_dim
    keys = _maybe(spec.seqlen_kv, spec.seqlen_kv % 32 > 0 or spec.seqlen_kv >= 1024)
    return dims and keys and _few_queries(spec) and spec.mask.pattern is None


def _mps_broadcast(spec: AttentionSpec) -> bool:
    """Whether a mask reaches SDPA smaller than (B, H, S_q, S_kv): a key mask does, and a dense one of size 1."""
    dense = spec.mask.dense
    if dense is not None:
        return any(size == 1 != full for size, full in zip(dense.shape, (spec.batch, spec.num_heads), strict=False))
    return spec.mask.key is not None or spec.mask.block is not None


MPS: tuple[KnownBad, ...] = (
    KnownBad(
        "mps-causal-half",
        _MPS,
        "rows see up to three later keys",
        "the causal flag in half precision",
        lambda s: _half(s) and s.mask.pattern is not None,
        "an explicit lower-triangular mask (made by anyattn for native)",
        f"{_PYTORCH}/issues/195910",
        "<2.14",
        device_type="mps",
    ),
    KnownBad(
        "mps-vector",
        _MPS,
        "garbage",
        "at most 8 queries, head_dim 64, 96 or 128, not causal, and seqlen_kv >= 1024 or not a multiple of 32",
        _mps_vector,
        "float32 written out (done by anyattn for native)",
        f"{_PYTORCH}/issues/174861",
        ">=2.8,<2.11",
        device_type="mps",
    ),
    KnownBad(
        "mps-query-view",
        _MPS,
        "wrong results",
        "at most 8 queries, and query not contiguous as (B, H, S, D)",
        lambda s: _few_queries(s) and not s.storage.bhsd_contiguous,
        "a contiguous copy (made by anyattn for native)",
        f"{_PYTORCH}/issues/163597",
        "<2.9",
        device_type="mps",
    ),
    KnownBad(
        "mps-value-dim",
        _MPS,
        "a wrong shape, or wrong results",
        "head_dim_v != head_dim",
        lambda s: s.head_dim_v != s.head_dim,
        "float32 written out (done by anyattn for native)",
        f"{_PYTORCH}/issues/176767",
        "<2.12",
        device_type="mps",
    ),
    KnownBad(
        "mps-broadcast-mask",
        _MPS,
        "wrong results",
        "at most 8 queries, and a mask that is the same for several heads or batch entries",
        lambda s: _few_queries(s) and _mps_broadcast(s),
        "the mask at its full size, contiguous (made by anyattn for native)",
        f"{_PYTORCH}/issues/184180",
        "<2.13",
        device_type="mps",
    ),
    KnownBad(
        "mps-long-half",
        _MPS,
        "results that are 2.4 % off",
        "half precision and more than 3068 queries or so",
        lambda s: _half(s) and _maybe(s.seqlen_q, s.seqlen_q > 3000),
        "float32 written out (done by anyattn for native)",
        f"{_PYTORCH}/issues/190791",
        device_type="mps",
    ),
    KnownBad(
        "mps-mask-and-causal",
        _MPS,
        "the process is aborted",
        "a mask beside the causal flag",
        lambda s: _masked(s) and s.mask.pattern is not None,
        "causal joined with the mask (done by anyattn for native)",
        f"{_PYTORCH}/issues/181856",
        "<2.13",
        device_type="mps",
    ),
    KnownBad(
        "mps-4g",
        _MPS,
        "wrong results",
        "batch * num_heads * seqlen_q * seqlen_kv > 2^32",
        lambda s: s.batch * s.num_heads * s.seqlen_q * s.seqlen_kv > 1 << 32,
        "fewer queries at a time",
        f"{_PYTORCH}/issues/179592",
        "<2.13",
        device_type="mps",
    ),
)
"""Rows for `native` and `native_math`; `native`'s adapter avoids most of them."""
