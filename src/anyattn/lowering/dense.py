"""Exact conversions of masks and biases to dense tensors, shared by the backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.backend.capabilities import Capabilities, needs_dense
from anyattn.backend.protocol import Lowering, Parts
from anyattn.lowering.cache import cached
from anyattn.lowering.storage import realigned, starts_aligned
from anyattn.masks.block_masks import written_out
from anyattn.masks.functions import MaskFunction
from anyattn.masks.objects import Mask
from anyattn.process.tracing import records
from anyattn.types.reasons import Conversion
from anyattn.types.spec import AttentionSpec, PatternSpec, describe_mask


def pattern_mask(
    pattern: PatternSpec,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
    like: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Make the boolean `(S_q, S_kv)` mask of a pattern, True = attend.

    `like` is query and key `(B, H, S, D)`. While a graph is recorded, the lengths are computed from them by operations
    of the graph: it may run with other lengths later, and make_fx treats two lengths that are equal now as one.
    """
    if like is not None and not torch.compiler.is_compiling() and records():
        rows, columns = _places(like[0]).unsqueeze(1), _places(like[1]).unsqueeze(0)
        if pattern.align == "lower_right":
            rows = rows + columns[:, -1:] - rows[-1:]
    else:
        offset = seqlen_kv - seqlen_q if pattern.align == "lower_right" else 0
        rows = torch.arange(seqlen_q, device=device).unsqueeze(1) + offset
        columns = torch.arange(seqlen_kv, device=device).unsqueeze(0)
    allowed: Tensor | None = None
    if pattern.right != -1:
        allowed = columns <= rows + pattern.right
    if pattern.left != -1:
        after = columns >= rows - pattern.left
        allowed = after if allowed is None else allowed & after
    if allowed is None:
        return torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool, device=device)
    return allowed


def _places(tensor: Tensor) -> Tensor:
    """Count the rows of `(B, H, S, D)` from 0, as operations on the tensor itself."""
    return torch.ones_like(tensor.detach()[0, 0, :, 0], dtype=torch.int64).cumsum(0) - 1


def key_mask(key: Tensor, seqlen_kv: int) -> Tensor:
    """Convert a key mask, or lengths `(B,)`, to a boolean `(B or 1, 1, 1, S_kv)`."""
    if key.dim() == 4:
        return key
    if key.dtype != torch.bool:
        key = torch.arange(seqlen_kv, device=key.device) < key.unsqueeze(1)
    return key[:, None, None, :]


def wide(attn_mask: Any) -> Tensor:
    """Return the one tensor of a mask (a tensor itself, key padding, or a dense mask) with four dimensions."""
    if isinstance(attn_mask, Mask):
        if attn_mask.key is not None:
            return attn_mask.wide_key()
        attn_mask = attn_mask.dense
    found: Tensor = attn_mask
    return found if found.dim() == 4 else found[(None,) * (4 - found.dim())]


def joined_mask(
    spec: AttentionSpec,
    parts: Parts,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
    *,
    pattern: bool,
    batch: int | None = None,
    like: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """Join every part of a mask into one tensor with four dimensions.

    Args:
        spec: The call.
        parts: Its tensors.
        seqlen_q: S_q.
        seqlen_kv: S_kv.
        device: The device to make it on.
        pattern: Whether to include the pattern.
        batch: B, for a backend that is traced with an unknown batch; None is the spec's.
        like: Query and key `(B, H, S, D)`, for a backend that may be recorded in a graph: see `pattern_mask`.

    Returns:
        Boolean (True = attend) or floating (added), broadcastable to `(B, H, S_q, S_kv)`; None if nothing is masked.
    """
    allowed: Tensor | None = None
    if pattern and spec.mask.pattern is not None:
        allowed = pattern_mask(spec.mask.pattern, seqlen_q, seqlen_kv, device, like)[None, None]
    if parts.key is not None:
        keys = key_mask(parts.key, seqlen_kv)
        allowed = keys if allowed is None else allowed & keys
    if isinstance(parts.block, MaskFunction):
        entries = spec.batch if batch is None else batch
        function = written_out(parts.block, entries, spec.num_heads, seqlen_q, seqlen_kv, device)
        allowed = function if allowed is None else allowed & function
    dense = parts.dense
    if dense is None:
        return allowed
    if allowed is None:
        return dense
    if dense.dtype == torch.bool:
        return allowed & dense
    return torch.where(allowed, dense, float("-inf"))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to an additive one of the given dtype; an additive one is returned unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


HUGE = 1e38
"""Biases below minus this are compressed by `within_base_2`."""


_COMPRESSED = (torch.bfloat16, torch.float32)
"""The dtypes whose finfo.min times log2(e) overflows the float32 that kernels compute in."""


def within_base_2(bias: Tensor) -> Tensor:
    """Compress biases near finfo.min, so that the factor log2(e) doesn't turn them into -inf.

    Kernels compute exponentials to base 2. A bias below finfo.min / log2(e) overflows to -inf, and a row filled with
    finfo.min counts as a row without a key. Beside such biases the scores are below the last place, so only the order
    of the biases matters. It is preserved: below -HUGE, distances are halved. Gradients pass unchanged; -inf stays.
    """
    if bias.dtype not in _COMPRESSED:
        return bias
    plain = _once(bias.detach())
    closer = torch.maximum(plain, torch.rsub(plain, -HUGE / 2, alpha=-0.5))
    return bias + (closer - plain).nan_to_num(0.0) if bias.requires_grad else closer.expand(bias.shape)


def _once(tensor: Tensor) -> Tensor:
    """Return a tensor without repetitions: a dimension of stride 0 gets the length 1."""
    if not torch.compiler.is_compiling() and not records():
        for axis, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[axis] > 1:
                tensor = tensor.narrow(axis, 0, 1)
    return tensor


_MOST_CACHED_BYTES = 1 << 25
"""The largest bias whose compressed copy is cached; for a larger one it is made at each call."""


def cached_within_base_2(bias: Tensor) -> Tensor:
    """Return `within_base_2` of a caller's tensor; cached if it takes at most 32 MiB and needs no gradient."""
    if bias.dtype not in _COMPRESSED or bias.requires_grad or bias.numel() * bias.element_size() > _MOST_CACHED_BYTES:
        return within_base_2(bias)
    return cached(bias, ("base 2",), lambda: within_base_2(bias))


def cached_key_bias(key: Tensor, seqlen_kv: int, dtype: torch.dtype) -> Tensor:
    """Return a key mask as a bias `(B or 1, 1, 1, S_kv)` of 0 and -inf with aligned rows; cached per mask."""

    def make() -> Tensor:
        bias = key_mask(key, seqlen_kv).to(dtype).log_()
        return F.pad(bias, (0, -seqlen_kv % 16))[..., :seqlen_kv] if seqlen_kv % 16 else bias

    return cached(key, ("bias", seqlen_kv, dtype), make)


def aligned_bias(mask: Tensor, query: Tensor, key: Tensor, *, strict: bool = False) -> Tensor:
    """Make the bias that fused kernels take: full shape, with rows that start at multiples of 16 elements.

    Args:
        mask: Boolean or floating, with four dimensions, each full or 1.
        query: `(B, H, S_q, D)`.
        key: `(B, H_kv, S_kv, D)`.
        strict: Whether the strides of dimensions of length 1 must be such multiples too.
    """
    # The logarithm of 1 and 0 is 0 and -inf; this takes fewer launches than torch.where.
    made_here = mask.dtype == torch.bool
    bias = mask.to(query.dtype).log_() if made_here else mask
    length = key.shape[2]
    if bias.shape[-1] != length:
        bias = bias.expand(*bias.shape[:-1], length)
    if not _rows_are_aligned(bias, strict, made_here=made_here):
        bias = F.pad(bias, (0, -length % 16)) if length % 16 else realigned(bias)
        bias = bias[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _rows_are_aligned(bias: Tensor, strict: bool, *, made_here: bool) -> bool:
    if bias.stride(-1) != 1:
        return False
    # A new tensor starts at the start of its storage.
    if not made_here and not starts_aligned(bias, 16 * bias.element_size()):
        return False
    return all((bias.shape[axis] == 1 and not strict) or bias.stride(axis) % 16 == 0 for axis in range(bias.dim() - 1))


def mask_conversions(caps: Capabilities, spec: AttentionSpec) -> tuple[Conversion, ...]:
    """Return what a backend with these capabilities does to a call's mask, for the decision."""
    if not needs_dense(caps, spec):
        return ()
    text = f"{describe_mask(spec.mask)} given to the kernel as one dense mask"
    return (Conversion("dense_mask", text),)


def is_copied_for(caps: Capabilities, spec: AttentionSpec, lowering: Lowering) -> bool:
    """Whether query, key and value are copied before the backend gets them: it needs alignment and doesn't copy."""
    return caps.aligned and not spec.storage.aligned and not lowering.copy


ALIGNED = Conversion("copy", "query, key and value copied to 16-byte aligned storage")
"""The conversion of calls for which `is_copied_for` is true."""
