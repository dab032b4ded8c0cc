"""What a backend declares that it accepts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from anyattn.backend.head_dims import HeadDims
from anyattn.backend.patterns import KernelPattern, in_alignment
from anyattn.environment import Arch
from anyattn.types.spec import UNKNOWN, Align, AttentionSpec, DenseSpec, MaskSpec, Storage

BOTH: frozenset[Align] = frozenset(("upper_left", "lower_right"))


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend accepts on one type of device; every default is the pessimistic one.

    A backend that takes a dense boolean mask also takes every pattern, key mask and mask function: its `run` converts
    them to one (`anyattn.lowering.dense.joined_mask`) for the calls of which `needs_dense` is true.

    Attributes:
        dtypes: The dtypes of query, key and value.
        arch_min: The lowest compute capability, for CUDA.
        arch_max: The highest, or None.
        rocm: Whether it runs on AMD GPUs.
        head_dim_max: The largest head_dim.
        head_dim_min: The smallest of head_dim and head_dim_v.
        head_dims: The head dims per compute capability, if they depend on it; capabilities not listed have none.
        head_dim_multiple: What head_dim and head_dim_v must be multiples of.
        head_dim_v: Whether value's head_dim may differ from query's.
        causal: The alignments in which the kernel itself does causal attention.
        causal_square: Whether it does so only if S_q == S_kv.
        window: The alignments in which the kernel itself does sliding windows.
        window_any_right: Whether a window's right side may have any size if S_q > S_kv; if not, it must be below S_kv.
            FlashAttention-2 treats a right side of S_kv or more as unbounded, though it may still mask keys. It treats
            an unbounded right side beside a bounded left one as S_kv, which then masks keys (`flash_api.cpp`; seen on
            an H100 with 2.8.3). It matters to kernels with `realigns` and windows.
        realigns: Whether the backend converts a pattern to its kernel's alignment (with `kernel_pattern`) if that is
            exact; otherwise the alignments must agree, or S_q == S_kv.
        key_mask: Whether the kernel itself takes a key mask.
        key_and_pattern: Whether it takes one together with a pattern.
        boolean: Whether it takes a dense boolean mask.
        bias: Whether it takes a dense additive mask.
        bias_float32: Whether that may be float32 with a half-precision query.
        block: Whether it takes a FlexAttention block mask or a mask function.
        mask_grad: Whether it computes the gradient of an additive mask.
        dead_rows: Whether rows without a key give zeros.
        gqa: Whether query heads may share key/value heads.
        dropout: Whether it does dropout.
        dropout_of_all: Whether dropout is right for dropout_p == 1.
        softcap: Whether it does softcap.
        sinks: Whether it does sinks.
        sinks_grad: Whether it computes their gradient.
        scale_any: Whether zero and negative scales are right.
        lse: Whether it returns the log-sum-exp.
        backward: Whether it computes gradients.
        deterministic: Whether its gradients can be deterministic.
        forward_ad: Whether it supports forward-mode AD (torch.func.jvp, dual tensors).
        vmap: Whether it can be called inside torch.vmap.
        exact: Whether it computes in the inputs' precision; False for quantised kernels.
        quantised: The lowest precision that a quantised kernel computes in: `"int8"`, `"fp8"` or `"fp4"`.
        value_max: The largest magnitude in value that the kernel can represent, or None for the dtype's own.
        unit_stride: Whether head_dim must be contiguous.
        aligned: Whether storage must be 16-byte aligned; it is copied if it isn't.
        batch_heads_max: The largest batch * num_heads, or None.
        batch_max: The largest batch, and the largest num_heads, or None.
        seqlen_kv_min: The fewest keys.
        varlen: Whether the kernel itself takes packed sequences; otherwise they are padded for it.
        device_guard: Whether its tensors' device must be the current one.
        default_stream: Whether the kernel always runs on CUDA's default stream; the call is then made there, and it and
            the current stream wait for each other.
        compile: Whether it works under torch.compile(fullgraph=True).
        cuda_graph: Whether it can be captured in a CUDA graph.
    """

    dtypes: frozenset[torch.dtype] = frozenset()
    arch_min: Arch | None = None
    arch_max: Arch | None = None
    rocm: bool = False
    head_dim_max: int = 0
    head_dim_min: int = 1
    head_dims: tuple[HeadDims, ...] = ()
    head_dim_multiple: int = 1
    head_dim_v: bool = False
    causal: frozenset[Align] = frozenset()
    causal_square: bool = False
    window: frozenset[Align] = frozenset()
    window_any_right: bool = False
    realigns: bool = False
    key_mask: bool = False
    key_and_pattern: bool = False
    boolean: bool = False
    bias: bool = False
    bias_float32: bool = False
    block: bool = False
    mask_grad: bool = False
    dead_rows: bool = False
    gqa: bool = False
    dropout: bool = False
    dropout_of_all: bool = False
    softcap: bool = False
    sinks: bool = False
    sinks_grad: bool = False
    scale_any: bool = False
    lse: bool = False
    backward: bool = False
    deterministic: bool = False
    forward_ad: bool = False
    vmap: bool = False
    exact: bool = False
    quantised: str = ""
    value_max: float | None = None
    unit_stride: bool = True
    aligned: bool = True
    batch_heads_max: int | None = None
    batch_max: int | None = None
    seqlen_kv_min: int = 1
    varlen: bool = False
    device_guard: bool = False
    default_stream: bool = False
    compile: bool = False
    cuda_graph: bool = False

    def replace(self, **changes: object) -> Capabilities:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def pattern_is_native(caps: Capabilities, spec: AttentionSpec) -> bool:
    """Whether the kernel itself does the call's pattern; if S_q == S_kv, any alignment will do."""
    pattern = spec.mask.pattern
    if pattern is None:
        return True
    if caps.realigns:
        return kernel_pattern(caps, spec) is not None
    aligns = caps.causal if pattern.is_causal else caps.window
    return pattern.align in aligns or (spec.same_lengths and bool(aligns))


def kernel_pattern(caps: Capabilities, spec: AttentionSpec) -> KernelPattern | None:
    """Return the call's pattern in the kernel's alignment; None if there is no exact one."""
    pattern = spec.mask.pattern
    if pattern is None:
        return None
    first: Align = pattern.align
    second: Align = "lower_right" if first == "upper_left" else "upper_left"
    for align in (first, second):
        if align not in caps.causal and align not in caps.window:
            continue
        # The lengths of each packed sequence aren't known.
        sizes = (UNKNOWN, UNKNOWN) if spec.packed else (spec.seqlen_q, spec.seqlen_kv)
        found = in_alignment(pattern, *sizes, align, same_lengths=spec.same_lengths)
        if found is None:
            continue
        causal = found.is_causal and align in caps.causal and (not caps.causal_square or _is_square(found, spec))
        window = align in caps.window and (caps.window_any_right or not _right_side_is_misread(found, spec))
        if found.is_full or window or causal:
            return found
    return None


def _right_side_is_misread(pattern: KernelPattern, spec: AttentionSpec) -> bool:
    """Whether a window's right side is one that needs `window_any_right`."""
    if spec.same_lengths:
        return False
    open_right = pattern.right == -1 and pattern.left >= 0
    if spec.packed:
        return pattern.right > 0 or open_right
    keys = spec.seqlen_kv if pattern.keys is None else pattern.keys[1] - pattern.keys[0]
    rows = spec.seqlen_q if pattern.rows is None else pattern.rows[1] - pattern.rows[0]
    return pattern.right >= keys if pattern.right > 0 else open_right and rows - 1 > keys


def as_run(caps: Capabilities | None, spec: AttentionSpec) -> AttentionSpec:
    """Return the call as a backend runs it: packed sequences are padded for a kernel that doesn't take them."""
    if not spec.packed or (caps is not None and caps.varlen):
        return spec
    pattern = spec.mask.pattern
    if pattern is None or pattern.align == "upper_left":
        mask = MaskSpec(pattern, "lengths", dead_rows=True, prefix=True)
        return spec.replace(packed=False, mask=mask, storage=Storage())
    shape = (spec.batch, 1, spec.seqlen_q, spec.seqlen_kv)
    mask = MaskSpec(dense=DenseSpec("boolean", torch.bool, shape), dead_rows=True)
    return spec.replace(packed=False, mask=mask, storage=Storage(), packed_pattern=pattern)


def _is_square(pattern: KernelPattern, spec: AttentionSpec) -> bool:
    """Whether as many rows as keys are left; False if sizes are unknown."""
    if spec.same_lengths:
        return True
    rows = spec.seqlen_q if pattern.rows is None else pattern.rows[1] - pattern.rows[0]
    keys = spec.seqlen_kv if pattern.keys is None else pattern.keys[1] - pattern.keys[0]
    return rows == keys != UNKNOWN


def needs_dense(caps: Capabilities, spec: AttentionSpec) -> bool:
    """Whether a pattern, key mask or mask function must be converted to a dense mask for this kernel."""
    mask = spec.mask
    function = mask.block is not None and mask.block.is_function and not caps.block
    if mask.block is not None and not caps.block and not function:
        return False
    pattern_left = mask.pattern is not None and not pattern_is_native(caps, spec)
    key_left = mask.key is not None and not caps.key_mask
    # Kernels differ in what a causal flag beside a dense mask does (SDPA's documentation forbids it): they are joined.
    joined = mask.dense is not None or key_left or function or (mask.key is not None and not caps.key_and_pattern)
    both = mask.pattern is not None and joined and not caps.key_and_pattern
    return pattern_left or key_left or both or function
