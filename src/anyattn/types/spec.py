"""A call without its data: everything that choosing a backend may depend on, as frozen values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Align = Literal["upper_left", "lower_right"]
Layout = Literal["BSHD", "BHSD"]
DenseKind = Literal["boolean", "bias"]
KeyKind = Literal["padding", "lengths"]

UNKNOWN = -1
"""An unknown size: a dynamic dimension while torch.compile traces."""


@dataclass(frozen=True, slots=True)
class PatternSpec:
    """A causal or windowed pattern; -1 is unbounded, and causal is `right == 0`.

    Attributes:
        left: Columns before a row's own position that it may see.
        right: Columns after it.
        align: Whether row i's own position is column i or `i + seqlen_kv - seqlen_q`.
    """

    left: int
    right: int
    align: Align

    @property
    def is_causal(self) -> bool:
        """Whether it is plain causal attention, without a window."""
        return self.left == -1 and self.right == 0


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A dense mask's shape and type.

    Attributes:
        kind: `"boolean"` (True = attend) or `"bias"` (added).
        dtype: Its dtype.
        shape: Its shape as four dimensions, each full, 1, or UNKNOWN.
    """

    kind: DenseKind
    dtype: torch.dtype
    shape: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A FlexAttention block mask's shape, and what its function depends on.

    Attributes:
        batch: How many batch entries it has blocks for: 1 or B.
        heads: How many heads it has blocks for: 1 or H.
        per_batch: Whether its function depends on the batch index.
        per_head: Whether its function depends on the head index.
        is_partial: Whether it has blocks of one entry only, though its function depends on the entry.
        is_function: Whether it is a function without blocks; `batch` is then B if its tensors fix it.
    """

    batch: int
    heads: int
    per_batch: bool = False
    per_head: bool = False
    is_partial: bool = False
    is_function: bool = False


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """What a call's mask is made of; all None means that every position is allowed.

    Attributes:
        pattern: Causal or window.
        key: Whether keys are masked per batch entry, and how it is given.
        dense: A dense mask.
        block: A FlexAttention block mask, or a mask function.
        dead_rows: Whether a row may have no allowed key, as far as is known without reading values.
        prefix: Whether the allowed keys are known to come first in each batch entry.
    """

    pattern: PatternSpec | None = None
    key: KeyKind | None = None
    dense: DenseSpec | None = None
    block: BlockSpec | None = None
    dead_rows: bool = False
    prefix: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is masked."""
        return self.pattern is None and self.key is None and self.dense is None and self.block is None


@dataclass(frozen=True, slots=True)
class Storage:
    """How query, key and value lie in memory, as far as it matters to kernels.

    Attributes:
        aligned: Whether every tensor and every row starts at a multiple of 16 bytes.
        unit_stride: Whether head_dim is contiguous in all three.
        expanded_kv: Whether key or value has a stride of 0 in a dimension longer than 1.
        bhsd_contiguous: Whether all three are contiguous when seen as (B, H, S, D).
        mask_aligned: Whether an additive mask's rows start at multiples of 16 bytes, contiguous along keys.
    """

    aligned: bool = True
    unit_stride: bool = True
    expanded_kv: bool = False
    bhsd_contiguous: bool = False
    mask_aligned: bool = True


@dataclass(frozen=True)
class AttentionSpec:
    """An attention call without its data: frozen, hashable, comparable.

    Sizes are ints, or UNKNOWN (-1) for dimensions that torch.compile keeps dynamic.

    Attributes:
        batch: B.
        seqlen_q: S_q.
        seqlen_kv: S_kv.
        num_heads: H, of the query.
        num_kv_heads: H_kv, of key and value; H is a multiple of it.
        head_dim: D, of query and key.
        head_dim_v: D_v, of value and output.
        dtype: The dtype of query, key and value.
        device_type: `"cuda"`, `"cpu"`, ...
        device_index: Which device of that type; None is the current one.
        layout: `"BSHD"` or `"BHSD"`.
        mask: What is masked.
        dropout_p: Probability with which a weight is dropped, in [0, 1].
        scale: What the scores are multiplied by; never None.
        softcap: `softcap * tanh(score / softcap)`, or None.
        sinks: Whether there are extra logits in the denominator.
        return_lse: Whether to return the log-sum-exp.
        requires_grad: Which of `"query"`, `"key"`, `"value"`, `"mask"`, `"sinks"` need a gradient.
        same_lengths: Whether S_q == S_kv; it may be known though the lengths aren't.
        storage: How the tensors lie in memory.
        deterministic: Whether torch.use_deterministic_algorithms is on.
        captured: Whether the call goes into a CUDA graph that is being captured.
        compiled: Whether the call is being traced by torch.compile or torch.export.
        forward_ad: Whether a tensor carries a tangent: forward-mode AD, as in torch.func.jvp and jacfwd.
        vmap: Whether torch.vmap hides a dimension of a tensor.
        packed: Whether sequences of several lengths are packed, `(T, H, D)`; batch is their number, and the lengths
            are those of the longest.
        packed_pattern: A pattern that became a dense mask when packed sequences were padded.
        is_gqa: Whether several query heads share one key/value head.
        needs_grad: Whether any input needs a gradient.
        is_empty: Whether there is no batch entry, no query, or no key.
    """

    batch: int
    seqlen_q: int
    seqlen_kv: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device_type: str
    scale: float
    device_index: int | None = None
    layout: Layout = "BSHD"
    mask: MaskSpec = MaskSpec()
    dropout_p: float = 0.0
    softcap: float | None = None
    sinks: bool = False
    return_lse: bool = False
    requires_grad: tuple[str, ...] = ()
    same_lengths: bool = True
    storage: Storage = Storage()
    deterministic: bool = False
    captured: bool = False
    compiled: bool = False
    packed: bool = False
    packed_pattern: PatternSpec | None = None
    forward_ad: bool = False
    vmap: bool = False
    # Fields, since torch.compile reads no properties of a frozen dataclass.
    is_gqa: bool = field(init=False, compare=False, repr=False)
    needs_grad: bool = field(init=False, compare=False, repr=False)
    is_empty: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_gqa", self.num_heads != self.num_kv_heads)
        object.__setattr__(self, "needs_grad", bool(self.requires_grad))
        object.__setattr__(self, "is_empty", 0 in (self.batch, self.seqlen_q, self.seqlen_kv))

    def replace(self, **changes: Any) -> AttentionSpec:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        data = dataclasses.asdict(self)
        data["dtype"] = _dtype_name(self.dtype)
        data["requires_grad"] = sorted(self.requires_grad)
        if self.mask.dense is not None:
            data["mask"]["dense"]["dtype"] = _dtype_name(self.mask.dense.dtype)
        return data

    def __str__(self) -> str:
        heads = f"{self.num_heads}" if not self.is_gqa else f"{self.num_heads}/{self.num_kv_heads}"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        parts = [
            f"{self.device_type} {_dtype_name(self.dtype)} B{self.batch} Sq{self.seqlen_q} Skv{self.seqlen_kv}"
            f" H{heads} D{dims}"
        ]
        mask = describe_mask(self.mask)
        if mask != "none":
            parts.append(f"mask {mask}")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p}")
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap}")
        if self.sinks:
            parts.append("sinks")
        if self.return_lse:
            parts.append("lse")
        if self.captured:
            parts.append("in a CUDA graph")
        if self.requires_grad:
            parts.append("grad of " + ", ".join(sorted(self.requires_grad)))
        if self.forward_ad:
            parts.append("forward-mode AD")
        if self.vmap:
            parts.append("under vmap")
        return ", ".join(parts)


def describe_mask(mask: MaskSpec) -> str:
    """Describe in words what a mask is made of."""
    parts = []
    if mask.pattern is not None:
        if mask.pattern.is_causal:
            parts.append(f"causal ({mask.pattern.align})")
        else:
            parts.append(f"window ({mask.pattern.left}, {mask.pattern.right}, {mask.pattern.align})")
    if mask.key is not None:
        parts.append(f"key {mask.key}")
    if mask.dense is not None:
        parts.append(f"{mask.dense.kind} {_dtype_name(mask.dense.dtype)} {mask.dense.shape}")
    if mask.block is not None:
        parts.append("function" if mask.block.is_function else "block")
    return " & ".join(parts) or "none"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
