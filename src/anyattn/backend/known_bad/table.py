"""Kernels known to be wrong or to crash; selection avoids them, and `anyattn doctor` lists them.

Each row names the kernel, the versions and devices, the condition on the call, where it is documented, and what to use
instead. Conditions are pure; for an unknown size (while torch.compile traces with dynamic shapes) the condition holds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from anyattn.backend.known_bad.mps import MPS
from anyattn.backend.known_bad.row import KnownBad
from anyattn.environment import Environment
from anyattn.types.spec import UNKNOWN, AttentionSpec

_PYTORCH = "https://github.com/pytorch/pytorch"


def _masked(spec: AttentionSpec) -> bool:
    return spec.mask.key is not None or spec.mask.dense is not None


def _given_as_boolean(spec: AttentionSpec) -> bool:
    """Whether the mask reaches SDPA as a boolean one, as do patterns that its causal flag can't express."""
    mask = spec.mask
    if mask.dense is not None:
        return mask.dense.kind == "boolean"
    return mask.key is not None or mask.pattern is not None or mask.block is not None


def _float32_bias(spec: AttentionSpec) -> bool:
    dense = spec.mask.dense
    return dense is not None and dense.kind == "bias" and dense.dtype != spec.dtype


def _half(spec: AttentionSpec) -> bool:
    return spec.dtype.itemsize == 2


def _maybe(size: int, holds: bool) -> bool:
    return size == UNKNOWN or holds


def _flash_backward_overflow(spec: AttentionSpec) -> bool:
    if not spec.needs_grad:
        return False
    if UNKNOWN in (spec.batch, spec.seqlen_q):
        return False  # an illegal access needs > 2^31 elements; dynamic lengths are rarely near it
    rows = (spec.seqlen_q + 127) // 128 * 128
    return spec.batch * spec.num_heads * rows * max(spec.head_dim, 32) > 1 << 31


TABLE: tuple[KnownBad, ...] = (
    KnownBad(
        "cudnn-backward-nan-mask",
        ("native_cudnn",),
        "NaN in the query's gradient",
        "a mask, gradients, and seqlen_q % 128 == 64",
        lambda s: s.needs_grad and _masked(s) and _maybe(s.seqlen_q, s.seqlen_q % 128 == 64),
        "native_efficient",
        f"{_PYTORCH}/issues/196678",
        ">=2.11",
    ),
    KnownBad(
        "cudnn-backward-nan-one-query",
        ("native_cudnn",),
        "NaN gradients",
        "gradients and seqlen_q == 1",
        lambda s: s.needs_grad and _maybe(s.seqlen_q, s.seqlen_q == 1),
        "native_efficient",
        "https://github.com/NVIDIA/cudnn-frontend (one-query backward)",
    ),
    KnownBad(
        "sdpa-bias-gradient",
        ("native",),
        "an error in the backward: SDPA's pick stores no log-sum-exp for a mask's gradient, or cuDNN has none",
        "an additive mask that needs a gradient",
        lambda s: "mask" in s.requires_grad,
        "native_efficient or native_math through its own op (done by anyattn)",
        "torch's kernel_backward.h (check_supported: lse_strideH); seen on an H200 with torch 2.11",
    ),
    KnownBad(
        "cudnn-dead-rows",
        ("native_cudnn",),
        "a row without a key attends to every key: SDPA masks with -65504, not -inf",
        "a boolean mask that may leave a row without a key",
        lambda s: s.mask.dead_rows and _given_as_boolean(s),
        "an additive mask of -inf (made by anyattn)",
        f"{_PYTORCH}/pull/177868; seen on an H100 with torch 2.11",
        "<2.12",
    ),
    KnownBad(
        "cudnn-minus-infinity",
        ("native_cudnn",),
        "NaN for rows of the mask that are all -inf",
        "a mask that may leave a row without a key, with cuDNN before 9.10",
        lambda s: s.mask.dead_rows,
        "native_efficient, or a newer cuDNN",
        f"{_PYTORCH}/pull/140837; right with 9.19 on an H100",
        cudnn="<9.10",
    ),
    KnownBad(
        "dropout-of-everything",
        ("native_flash", "native_efficient", "native_cudnn"),
        "an error; native_efficient silently keeps some weights",
        "dropout_p == 1",
        lambda s: s.dropout_p == 1,
        "native_math",
        "seen on an H100 with torch 2.11",
    ),
    KnownBad(
        "cudnn-float32-mask",
        ("native_cudnn",),
        "NaN: the mask's bits are read as the query's dtype",
        "an additive float32 mask with a half-precision query",
        lambda s: _float32_bias(s) and _half(s),
        "native_efficient",
        f"{_PYTORCH}/pull/191612; seen on an H100 with torch 2.11",
        "<2.14",
    ),
    KnownBad(
        "cudnn-b200-few-kv-heads",
        ("native_cudnn",),
        "silently corrupt output",
        "fewer key/value heads than query heads, on sm100",
        lambda s: s.is_gqa,
        "native_flash",
        f"{_PYTORCH}/issues/193893",
        archs=(10,),
    ),
    KnownBad(
        "scale-not-positive",
        ("native_cudnn", "native_flash"),
        "NaN everywhere",
        "scale <= 0",
        lambda s: s.scale <= 0,
        "native_efficient or native_math",
        "seen on an H100 with torch 2.11",
    ),
    KnownBad(
        "flash-many-heads",
        ("native_flash",),
        "a CUDA error that loses the context",
        "batch * num_heads > 65535",
        lambda s: s.batch * s.num_heads > 65535,
        "native_efficient",
        "seen on an H100 with torch 2.11",
    ),
    KnownBad(
        "flash-backward-overflow",
        ("native_flash",),
        "an illegal memory access in the backward",
        "batch * num_heads * seqlen_q * head_dim > 2^31 with gradients",
        _flash_backward_overflow,
        "native_efficient",
        "https://github.com/PriorLabs/TabPFN/issues/1184",
    ),
    KnownBad(
        "efficient-mask-offset",
        ("native_efficient",),
        "wrong results: mask offsets are 32-bit",
        "a mask, and seqlen_q * seqlen_kv > 2^32",
        lambda s: (_masked(s) or s.mask.pattern is not None) and s.seqlen_q * s.seqlen_kv > 1 << 32,
        "native_math, or shorter sequences",
        f"{_PYTORCH}/issues/162588",
        "<2.13",
    ),
    KnownBad(
        "efficient-many-heads",
        ("native_efficient",),
        "wrong results or a launch failure",
        "batch or num_heads >= 65536",
        lambda s: max(s.batch, s.num_heads) >= 65536,
        "native_math, or a split batch",
        f"{_PYTORCH}/issues/142228",
    ),
    KnownBad(
        "efficient-expanded-kv",
        ("native_efficient",),
        "wrong results if the last tile has one query",
        "key or value expanded (stride 0) along the heads",
        lambda s: s.storage.expanded_kv,
        "a contiguous copy (made by anyattn)",
        f"{_PYTORCH}/pull/191937",
    ),
    KnownBad(
        "cpu-flash-causal-scale",
        ("native_flash", "native"),
        "NaN: scores are masked with -inf before they are scaled",
        "the causal flag and scale <= 0",
        lambda s: s.scale <= 0 and s.mask.pattern is not None and s.mask.pattern.is_causal,
        "causal as a dense mask (made by anyattn)",
        "seen with torch 2.13 on a CPU",
        device_type="cpu",
    ),
    KnownBad(
        "cpu-flash-float32-bias",
        ("native_flash", "native"),
        "-inf in the bias is lost, so rows without a key aren't zero",
        "an additive float32 mask with a float64 query, and 16 keys or more",
        lambda s: _float32_bias(s) and s.dtype == torch.float64,
        "the bias cast to float64 (done by anyattn)",
        "seen with torch 2.13 on a CPU",
        device_type="cpu",
    ),
    KnownBad(
        "cpu-flash-shared-heads",
        ("native_flash",),
        "memory past key and value is read, and written by the backward: huge numbers, NaN, or the process ends",
        "fewer key/value heads than query heads",
        lambda s: s.is_gqa,
        "key and value with their heads repeated (done by anyattn), or torch 2.9",
        f"{_PYTORCH}/pull/157893; seen with torch 2.6 and 2.8 on a CPU",
        "<2.9",
        device_type="cpu",
    ),
    KnownBad(
        "mps-permuted-views",
        ("native",),
        "wrong results",
        "query, key or value not contiguous as (B, H, S, D)",
        lambda s: not s.storage.bhsd_contiguous,
        "a contiguous copy (made by anyattn)",
        f"{_PYTORCH}/issues/181133",
        device_type="mps",
    ),
    *MPS,
    KnownBad(
        "flash4-backward-head-dims",
        ("flash4 (backward)",),
        "gradients that are wrong without an error, or an error",
        "gradients on sm90, unless head_dim and head_dim_v are the same multiple of 32",
        lambda s: s.needs_grad and (s.head_dim % 32 > 0 or s.head_dim != s.head_dim_v),
        "both padded with zeros (done by anyattn)",
        "flash_bwd_sm90.py and flash_bwd_postprocess.py round head_dim differently; seen on an H100 with 4.0.0b36",
        archs=(9,),
    ),
    KnownBad(
        "flex-cpu-tail",
        ("flex (compiled)",),
        "wrong results or NaN",
        "compiled for a CPU without AVX-512, and seqlen_kv % 16 == 8",
        lambda s: _maybe(s.seqlen_kv, s.seqlen_kv % 16 == 8),
        "keys padded to a multiple of 16 (done by anyattn), eager flex, or native",
        "seen with torch 2.13 and inductor's code for AVX2; right with its code for AVX-512",
        ">=2.5",
        device_type="cpu",
        unless_cpu="AVX512",
    ),
    KnownBad(
        "flex-cpu-strides",
        ("flex (compiled)",),
        "memory written past its end, which ends the process",
        "compiled for a CPU, and query, key or value not contiguous as (B, H, S, D)",
        lambda s: True,  # on a CPU strides aren't part of a spec
        "contiguous tensors (done by anyattn), torch 2.13, eager flex, or native",
        "seen with torch 2.11, for AVX2 and for AVX-512; right with torch 2.13",
        ">=2.5,<2.13",
        device_type="cpu",
    ),
    KnownBad(
        "flex-cuda-strides",
        ("flex (compiled)",),
        "wrong results, and float32 computed in TF32",
        "query, key or value whose head_dim isn't contiguous",
        lambda s: not s.storage.unit_stride,
        "contiguous tensors (done by anyattn)",
        "seen on an H100 with torch 2.11",
    ),
    KnownBad(
        "flex-block-mask-one-head",
        ("flex (compiled)",),
        "head 0's blocks are used for every head",
        "a BlockMask made with H=None (or B=None) whose function depends on the head (or batch entry)",
        lambda s: False,  # not visible in a spec: `anyattn.masks.Block` documents it, and the value checks find it
        "create_block_mask with the full B and H",
        "seen on an H100 with torch 2.11",
    ),
)


def hits(backends: Iterable[str], spec: AttentionSpec, env: Environment) -> tuple[KnownBad, ...]:
    """Return the rows that concern any of these backends for this call on this machine."""
    names = tuple(backends)
    return tuple(row for row in TABLE if any(row.concerns(name, env, spec) for name in names))
