"""How a call reaches one SDPA kernel, with its conversions."""

from __future__ import annotations

from collections.abc import Iterator

from anyattn.adapters.native import kernels
from anyattn.adapters.native.declarations import why_repeated
from anyattn.backend.capabilities import Capabilities, needs_dense, pattern_is_native
from anyattn.backend.declared_reasons import lowered_mask_reasons
from anyattn.backend.protocol import Lowering
from anyattn.environment import Environment
from anyattn.lowering.dense import mask_conversions
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec


def lower_to(entry: str, caps: Capabilities, spec: AttentionSpec, env: Environment) -> Lowering:
    """Return how a call reaches one entry, with its conversions."""
    dense = needs_dense(caps, spec)
    conversions = list(mask_conversions(caps, spec))
    copy = entry in kernels.FUSED_CUDA and not (spec.storage.aligned and spec.storage.unit_stride)
    if copy:
        text = "query, key and value copied: the kernel needs 16-byte aligned rows and a contiguous head_dim"
        conversions.append(Conversion("copy", text))
    why = why_repeated(entry, spec, env)
    if why:
        conversions.append(Conversion("repeat_heads", f"key and value heads repeated in memory: {why}"))
    if entry in ("flash", "cudnn") and spec.head_dim % 8:
        conversions.append(Conversion("pad_head_dim", f"head_dim {spec.head_dim} padded to a multiple of 8"))
    pattern = spec.mask.pattern
    is_causal = pattern is not None and not dense and pattern.is_causal and pattern_is_native(caps, spec)
    if is_causal and _loses_causal(entry, spec):
        is_causal, dense = False, True
        conversions.append(Conversion("dense_mask", "causal passed as a dense mask: the flag gives NaN if scale <= 0"))
    return Lowering(entry, is_causal, dense, copy, repeat_heads=bool(why), conversions=tuple(conversions))


def _loses_causal(entry: str, spec: AttentionSpec) -> bool:
    """Whether the kernel may mask with -inf before it scales, which gives NaN: the CPU flash kernel (torch 2.13)."""
    return spec.scale <= 0 and spec.device_type == "cpu" and entry in ("sdpa", "flash_cpu")


def dense_causal_reasons(entry: str, spec: AttentionSpec) -> Iterator[Reason]:
    """Refuse a causal call whose dense mask would be too large, if it needs one."""
    pattern = spec.mask.pattern
    if pattern is not None and pattern.is_causal and _loses_causal(entry, spec):
        yield from lowered_mask_reasons(spec)
