"""One case: a call of attention in words, small enough to paste, that makes its own tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattn import api, reference
from anyattn.masks.objects import Mask
from anyattn.testing.cases import recipes
from anyattn.types.spec import AttentionSpec

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True, repr=False)
class Case:
    """A call of attention in words; its `repr`, pasted back, is the same case.

    Attributes:
        batch: B.
        seqlen_q: S_q.
        seqlen_kv: S_kv.
        heads: H.
        kv_heads: H_kv; where it differs from H, `enable_gqa=True` is passed.
        head_dim: D.
        head_dim_v: D_v; 0 is D.
        dtype: The name of query's dtype.
        device: Where.
        layout: `"BSHD"` calls `attention`, `"BHSD"` `scaled_dot_product_attention`.
        mask: A recipe; see `anyattn.testing.cases.recipes.make_mask`.
        scale: As for `attention`.
        softcap: As for `attention`.
        sinks: Whether there are sinks.
        dropout_p: As for `attention`.
        lse: Whether the log-sum-exp is asked for.
        grad: Which gradients: letters of q, k, v, m (the bias).
        data: One of `recipes.DATA`.
        strides: One of `recipes.STRIDES`.
        seed: Of the values.
    """

    batch: int = 2
    seqlen_q: int = 7
    seqlen_kv: int = 7
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    layout: str = "BSHD"
    mask: str = "none"
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    lse: bool = False
    grad: str = ""
    data: str = "normal"
    strides: str = "plain"
    seed: int = 0

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"Case({', '.join(changed)})"

    def replace(self, **changes: Any) -> Case:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of query, key and value."""
        return DTYPES[self.dtype]

    @property
    def factor(self) -> float:
        """What scores are multiplied by: `scale`, or its default."""
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def build(self) -> Inputs:
        """Make the tensors: the same ones each time, whatever the device."""
        generator = torch.Generator().manual_seed(self.seed)
        dim_v = self.head_dim_v or self.head_dim
        shapes = (
            (self.batch, self.seqlen_q, self.heads, self.head_dim),
            (self.batch, self.seqlen_kv, self.kv_heads, self.head_dim),
            (self.batch, self.seqlen_kv, self.kv_heads, dim_v),
        )
        query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
        query, key, value = recipes.values(self.data, query, key, value)
        query, key, value = (tensor.to(self.torch_dtype).to(self.device) for tensor in (query, key, value))
        if self.layout == "BHSD":
            # `stored` thinks in (B, S, H, D): contiguous as (B, H, S, D) is what it calls transposed.
            kind = {"plain": "transposed", "transposed": "plain"}.get(self.strides, self.strides)
        else:
            kind = self.strides
        query, key, value = recipes.stored(kind, (query, key, value))
        if self.layout == "BHSD":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        sizes = (self.batch, self.heads, self.seqlen_q, self.seqlen_kv)
        mask = recipes.make_mask(self.mask, sizes, self.torch_dtype, self.device, generator)
        sinks = torch.randn(self.heads, generator=generator).to(self.device) if self.sinks else None
        for letter, tensor in zip("qkv", (query, key, value), strict=True):
            tensor.requires_grad_(letter in self.grad)
        if "m" in self.grad and mask is not None and mask.dense is not None:
            mask.dense.requires_grad_()
        return Inputs(self, query, key, value, mask, sinks)


Answer = tuple[Tensor, "Tensor | None"]
"""The output (B, S, H, D_v), and the log-sum-exp where it was asked for."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, in its layout, and the ways to run them.

    Attributes:
        case: The case.
        query: In the case's layout, as are key and value.
        key: Key.
        value: Value.
        mask: The mask, or None.
        sinks: `(H,)`, or None.
        flow: The gradient that flows into the output, (B, S, H, D_v); None is normals fixed by the case's seed.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    sinks: Tensor | None
    flow: Tensor | None = None

    def replace(self, **changes: Any) -> Inputs:
        """Return a copy with some tensors changed."""
        return dataclasses.replace(self, **changes)

    def options(self, **changes: Any) -> dict[str, Any]:
        """Return the arguments of `attention` beside the three tensors."""
        case = self.case
        given: dict[str, Any] = {
            "attn_mask": self.mask,
            "dropout_p": case.dropout_p,
            "scale": case.scale,
            "enable_gqa": case.heads != case.kv_heads,
            "softcap": case.softcap,
            "sinks": self.sinks,
            "return_lse": case.lse,
        }
        return given | changes

    def attend(self, backend: str, **changes: Any) -> Answer:
        """Run the call with a backend; the output is given as (B, S, H, D_v) whatever the layout."""
        call = api.attention if self.case.layout == "BSHD" else api.scaled_dot_product_attention
        result = call(self.query, self.key, self.value, **self.options(**changes), backend=backend)
        out, lse = result if isinstance(result, tuple) else (result, None)
        return self.bshd(out), lse

    def bshd(self, tensor: Tensor) -> Tensor:
        """View a tensor of the case's layout as (B, S, H, D)."""
        return tensor if self.case.layout == "BSHD" else tensor.transpose(1, 2)

    def refer(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Run the reference, in float64 or in another dtype to measure that dtype's own error."""
        return reference.attention(
            self.bshd(self.query),
            self.bshd(self.key),
            self.bshd(self.value),
            self.mask,
            scale=self.case.scale,
            softcap=self.case.softcap,
            sinks=self.sinks,
            dtype=dtype,
        )

    def spec(self) -> AttentionSpec:
        """Describe the call.

        Raises:
            InvalidCallError: If it is wrong for any backend.
        """
        from anyattn.call.arguments import describe
        from anyattn.call.facts import Options

        case = self.case
        options = Options(
            dropout_p=case.dropout_p,
            scale=case.scale,
            enable_gqa=case.heads != case.kv_heads,
            softcap=case.softcap,
            return_lse=case.lse,
            layout=case.layout,  # type: ignore[arg-type]
        )
        return describe(self.query, self.key, self.value, self.mask, self.sinks, options)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors whose gradients the case asks for, by name."""
        named = {"query": self.query, "key": self.key, "value": self.value}
        if self.mask is not None and self.mask.dense is not None:
            named["mask"] = self.mask.dense
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def detached(self) -> Inputs:
        """Return the same tensors without gradients, sharing their storage."""
        mask = self.mask
        if mask is not None and mask.dense is not None:
            mask = Mask(pattern=mask.pattern, key=mask.key, dense=mask.dense.detach(), block=mask.block)
        return self.replace(query=self.query.detach(), key=self.key.detach(), value=self.value.detach(), mask=mask)
