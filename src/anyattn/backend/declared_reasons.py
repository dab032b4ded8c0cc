"""The reasons for which a backend's declaration refuses a call."""

from __future__ import annotations

import math
from collections.abc import Iterator

from anyattn.backend.capabilities import Capabilities, needs_dense, pattern_is_native
from anyattn.environment import Device
from anyattn.types.reasons import Reason
from anyattn.types.spec import UNKNOWN, AttentionSpec, describe_mask

MAX_LOWERED_MASK_BYTES = 1 << 30
"""The largest dense mask (bytes) made from a pattern, key mask or mask function; see `lowered_mask_bytes`."""


def declared_reasons(caps: Capabilities, spec: AttentionSpec, device: Device | None) -> Iterator[Reason]:
    """Yield every reason for which the declaration refuses the call."""
    yield from _hardware(caps, spec, device)
    yield from _shape(caps, spec)
    yield from _head_dims(caps, spec, device)
    yield from _mask(caps, spec)
    yield from _features(caps, spec)
    yield from _gradients(caps, spec)


def named_device(*kinds: str) -> str:
    """Name types of devices in a reason: `a cuda or an xla device`."""
    return " or ".join(f"{'an' if kind in ('mps', 'npu', 'xla', 'xpu') else 'a'} {kind}" for kind in kinds) + " device"


def _hardware(caps: Capabilities, spec: AttentionSpec, device: Device | None) -> Iterator[Reason]:
    if device is None:
        yield Reason("no_device", named_device(spec.device_type), "none on this machine")
    elif device.rocm:
        if not caps.rocm:
            yield Reason("arch", "an NVIDIA GPU", f"AMD ({device.name})")
    elif device.arch is not None:
        low, high = caps.arch_min, caps.arch_max
        if (low and device.arch < low) or (high and device.arch > high):
            upto = " or newer" if not high else "" if high == low else f" to sm{high[0]}{high[1]}"
            need = f"sm{low[0]}{low[1]}{upto}" if low else f"an arch{upto}"
            yield Reason("arch", need, f"sm{device.arch[0]}{device.arch[1]} ({device.name})")
    if spec.dtype not in caps.dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in caps.dtypes))
        yield Reason("dtype", names or "nothing", str(spec.dtype).removeprefix("torch."), "cast query, key and value")


def _shape(caps: Capabilities, spec: AttentionSpec) -> Iterator[Reason]:
    largest = max(spec.head_dim, spec.head_dim_v)
    if largest > caps.head_dim_max:
        yield Reason("head_dim", f"head_dim <= {caps.head_dim_max}", str(largest))
    if min(spec.head_dim, spec.head_dim_v) < caps.head_dim_min:
        yield Reason("head_dim", f"head_dim >= {caps.head_dim_min}", str(min(spec.head_dim, spec.head_dim_v)))
    for name, size in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
        if size % caps.head_dim_multiple:
            yield Reason("head_dim", f"{name} a multiple of {caps.head_dim_multiple}", str(size))
    if spec.head_dim_v != spec.head_dim and not caps.head_dim_v:
        yield Reason("head_dim_v", "head_dim_v == head_dim", f"{spec.head_dim_v} != {spec.head_dim}")
    if spec.is_gqa and not caps.gqa:
        heads = f"{spec.num_heads} query heads on {spec.num_kv_heads}"
        yield Reason("gqa", "as many key/value heads as query heads", heads, "repeat key and value's heads")
    if UNKNOWN < spec.seqlen_kv < caps.seqlen_kv_min and not spec.is_empty:
        yield Reason("seqlen", f"seqlen_kv >= {caps.seqlen_kv_min}", str(spec.seqlen_kv))
    limit = caps.batch_heads_max
    if limit is not None and spec.batch * spec.num_heads > limit:
        yield Reason("size", f"batch * num_heads <= {limit}", str(spec.batch * spec.num_heads), "split the batch")
    limit = caps.batch_max
    if limit is not None and max(spec.batch, spec.num_heads) > limit:
        yield Reason("size", f"batch and num_heads <= {limit}", f"{spec.batch} and {spec.num_heads}", "split the batch")
    if caps.unit_stride and not spec.storage.unit_stride:
        yield Reason("layout", "a contiguous head_dim", "a stride along head_dim", "call .contiguous()")


def _head_dims(caps: Capabilities, spec: AttentionSpec, device: Device | None) -> Iterator[Reason]:
    """Refuse head dims that the kernels for the device's arch, if it is known, don't have."""
    if not caps.head_dims or device is None or device.arch is None:
        return
    if max(spec.head_dim, spec.head_dim_v) > caps.head_dim_max:
        return  # refused everywhere
    low, high = caps.arch_min, caps.arch_max
    if (low and device.arch < low) or (high and device.arch > high):
        return  # refused for the arch
    major, minor = device.arch
    found = next((dims for dims in caps.head_dims if dims.major == major), None)
    if found is None or not found.takes(spec):
        need = "an arch whose head dims are known" if found is None else f"head_dim {found}"
        yield Reason("head_dim", f"{need} on sm{major}{minor}", f"{spec.head_dim} and {spec.head_dim_v}")


def _mask(caps: Capabilities, spec: AttentionSpec) -> Iterator[Reason]:
    mask = spec.mask
    dense = needs_dense(caps, spec)
    if spec.packed_pattern is not None and spec.batch * spec.seqlen_q * spec.seqlen_kv > MAX_LOWERED_MASK_BYTES:
        size = spec.batch * spec.seqlen_q * spec.seqlen_kv >> 20
        need = f"a mask of at most {MAX_LOWERED_MASK_BYTES >> 20} MiB made from the packed sequences' lengths"
        yield Reason("memory", need, f"{size} MiB", "choose a backend that takes packed sequences (flash2, flash4)")
    if dense and not caps.boolean:
        hint = "choose flex" if mask.block is not None else "flex takes every mask"
        yield Reason("mask", "a mask that its kernel can express", _unsupported(caps, spec), hint)
    if dense and caps.boolean:
        yield from lowered_mask_reasons(spec)
    if mask.dense is not None and not (caps.bias if mask.dense.kind == "bias" else caps.boolean):
        yield Reason("mask", f"no dense {mask.dense.kind} mask", f"a {mask.dense.kind} mask")
    is_bias = mask.dense is not None and mask.dense.kind == "bias"
    if is_bias and not caps.bias_float32 and mask.dense is not None and mask.dense.dtype != spec.dtype:
        yield Reason(
            "mask_dtype",
            f"an additive mask of query's dtype {spec.dtype}",
            str(mask.dense.dtype),
            "cast the mask (finfo.min becomes -inf in a narrower dtype)",
        )
    if mask.block is not None and not caps.block and not mask.block.is_function:
        yield Reason("mask", "no block mask", "a FlexAttention block mask", "choose flex")
    if mask.dead_rows and not caps.dead_rows:
        yield Reason(
            "mask",
            "a mask known to leave every row a key",
            "one that may not",
            "anyattn.prepare_mask(mask) checks once, and caches the answer",
        )


def lowered_mask_bytes(spec: AttentionSpec) -> int:
    """Return the bytes of the dense mask made from a call's mask; 0 if sizes are unknown.

    A boolean mask takes one byte per position, and query's itemsize more in the additive mask that SDPA kernels get;
    a joined bias has its own dtype. Heads and batch entries count if they differ.
    """
    mask, dense, block = spec.mask, spec.mask.dense, spec.mask.block
    if UNKNOWN in (spec.batch, spec.seqlen_q, spec.seqlen_kv):
        return 0
    shape = (1, 1, 1, 1) if dense is None else dense.shape
    per_batch = mask.key is not None or (block is not None and block.per_batch) or shape[0] != 1
    per_head = (block is not None and block.per_head) or shape[1] != 1
    per_row = mask.pattern is not None or block is not None or shape[2] != 1
    positions = (spec.batch if per_batch else 1) * (spec.num_heads if per_head else 1) * spec.seqlen_kv
    return positions * (spec.seqlen_q if per_row else 1) * _bytes_of_position(spec)


def _bytes_of_position(spec: AttentionSpec) -> int:
    dense = spec.mask.dense
    return dense.dtype.itemsize if dense is not None and dense.kind == "bias" else 1 + spec.dtype.itemsize


def lowered_mask_reasons(spec: AttentionSpec) -> Iterator[Reason]:
    """Refuse a dense mask above the limit, unless the user's own dense mask is as large."""
    made = lowered_mask_bytes(spec)
    shape = (0, 0, 0, 0) if spec.mask.dense is None else spec.mask.dense.shape
    own = math.prod(shape) * _bytes_of_position(spec)
    if made > max(MAX_LOWERED_MASK_BYTES, own):
        yield Reason(
            "memory",
            f"a mask of at most {MAX_LOWERED_MASK_BYTES >> 20} MiB made from {describe_mask(spec.mask)}",
            f"{made >> 20} MiB",
            "choose flex or another backend whose kernel takes it, or pass the mask as a tensor",
        )


def _unsupported(caps: Capabilities, spec: AttentionSpec) -> str:
    mask = spec.mask
    parts = []
    if mask.pattern is not None and not pattern_is_native(caps, spec):
        kind = "causal" if mask.pattern.is_causal else "window"
        parts.append(f"{kind} ({mask.pattern.align}, seqlen_q {spec.seqlen_q}, seqlen_kv {spec.seqlen_kv})")
    if mask.key is not None and not caps.key_mask:
        parts.append(f"key {mask.key}")
    if mask.block is not None and mask.block.is_function and not caps.block:
        parts.append("a mask function")
    return " and ".join(parts) or f"a pattern together with another mask: {describe_mask(mask)}"


def _features(caps: Capabilities, spec: AttentionSpec) -> Iterator[Reason]:
    if spec.dropout_p and not caps.dropout:
        yield Reason("dropout", "dropout_p == 0", str(spec.dropout_p))
    elif spec.dropout_p >= 1 and not caps.dropout_of_all:
        yield Reason("dropout", "dropout_p < 1", str(spec.dropout_p), "choose native_math")
    if spec.softcap is not None and not caps.softcap:
        yield Reason("softcap", "no softcap", str(spec.softcap), "choose flex")
    if spec.sinks and not caps.sinks:
        if not caps.lse:
            yield Reason("sinks", "no sinks", "sinks", "choose a backend that returns lse")
        elif spec.needs_grad or spec.forward_ad:
            yield Reason("sinks", "sinks without gradients (done by rescaling with lse)", "gradients are needed")
        elif spec.dropout_p:
            yield Reason("sinks", "sinks without dropout (done by rescaling with lse)", f"dropout {spec.dropout_p}")
    if "sinks" in spec.requires_grad and caps.sinks and not caps.sinks_grad:
        yield Reason("backward", "sinks that need no gradient", "sinks that require one", "detach them")
    if spec.scale <= 0 and not caps.scale_any:
        yield Reason("scale", "scale > 0 (the kernel gives NaN otherwise)", str(spec.scale))
    if spec.return_lse and not caps.lse:
        yield Reason("lse", "return_lse=False", "return_lse=True")
    if spec.return_lse and spec.dropout_p:
        yield Reason("lse", "return_lse without dropout", f"dropout_p {spec.dropout_p}")
    if spec.compiled and not caps.compile:
        hint = "use torch.compiler.disable around the call, or choose another backend"
        yield Reason("compile", "a call outside torch.compile", "one that is being traced", hint)
    if spec.captured and not caps.cuda_graph:
        hint = "run it outside the graph, or choose another backend"
        yield Reason("cuda_graph", "a call outside the capture of a CUDA graph", "one that is being captured", hint)


def _gradients(caps: Capabilities, spec: AttentionSpec) -> Iterator[Reason]:
    if spec.needs_grad and not caps.backward:
        needed = ", ".join(sorted(spec.requires_grad))
        yield Reason("backward", "no gradients", f"gradients of {needed}", "use torch.no_grad(), or another backend")
    if spec.forward_ad and not caps.forward_ad:
        hint = "use reverse mode (torch.func.vjp, jacrev), or choose native or native_math"
        yield Reason("forward_ad", "no forward-mode AD", "a tensor with a tangent (torch.func.jvp)", hint)
    if spec.vmap and not caps.vmap:
        hint = "pass the whole batch in one call, or choose native"
        yield Reason("vmap", "a call outside torch.vmap", "a tensor with a dimension hidden by torch.vmap", hint)
    if "mask" in spec.requires_grad and caps.backward and not caps.mask_grad:
        yield Reason("mask_grad", "a mask that needs no gradient", "a mask that requires one", "detach the mask")
    if spec.deterministic and spec.needs_grad and caps.backward and not caps.deterministic:
        yield Reason("deterministic", "torch.use_deterministic_algorithms(False)", "True")
