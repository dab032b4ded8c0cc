"""Ascend's fused attention: `torch_npu.npu_fusion_attention`.

Sources: `op_plugin/config/op_plugin_functions.yaml` and the API document of Ascend's op-plugin 517f2e7d, and the
document in torch_npu 2.14. No NPU has run this adapter: a contract double stands in for the kernel.

In its mask True means masked, and its scale defaults to 1. Without a mask tensor its causal modes silently attend to
everything, so the compressed 2048 x 2048 mask is always passed with them. Its additive input (`pse`) isn't used:
document and example disagree on whether it is scaled.

Packed sequences use its layout TND. Softmax's maximum and sum have the shape `(T, N, 8)` there, but are stored sequence
by sequence as `(N, S, 8)` unless `softmax_layout="TND"` is passed, which older versions don't know (MindSpeed's
`flatten_softmax` undoes it). So sequences are padded if lse is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyattn.adapters import _dense
from anyattn.adapters._dense import KernelCall
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend, Lowering, Output, Parts, Plan
from anyattn.environment import Environment
from anyattn.lowering import host_lengths
from anyattn.lowering.host_lengths import Sequences
from anyattn.lowering.storage import realigned
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_NPU = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16, torch.float32)),
    head_dim_max=768,
    causal=frozenset(("upper_left", "lower_right")),
    realigns=True,
    boolean=True,
    dead_rows=True,
    gqa=True,
    # keep_prob is in (0, 1], so dropout_p < 1.
    dropout=True,
    lse=True,
    backward=True,
    exact=True,
    unit_stride=False,
    varlen=True,
)

_MOST = {"batch": 2 << 20, "num_heads": 256, "seqlen_q": 1 << 20, "seqlen_kv": 1 << 20}
"""The document's limits of sizes."""

_MOST_PACKED = 1 << 10
"""The most packed sequences: the document says 2K in one place and 1K in another."""

_MOST_TOKENS = 1 << 20

_COMPRESSED = 2048
_UPPER_LEFT, _LOWER_RIGHT = 2, 3
_INVALID_ROWS = 2


class Npu(Backend):
    """torch_npu's fused attention."""

    name = "npu"
    family = "npu"
    aliases = ("_native_npu",)
    auto_rank = 5
    packages = (
        Package(
            "torch-npu",
            "torch_npu",
            ("npu_fusion_attention",),
            install="pip install torch_npu (of torch's own minor version)",
        ),
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {"npu": _NPU}

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = self.declarations.get(spec.device_type)
        return caps.replace(varlen=False) if caps is not None and spec.packed and not _packs(spec) else caps

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        for name, most in _MOST.items():
            size = getattr(spec, name)
            if size > most:
                yield Reason("size", f"{name} <= {most}", str(size), "split the call")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        lowering = _dense.lower("npu_fusion_attention", self.declarations[spec.device_type], spec)
        if not spec.packed:
            return lowering
        return dataclasses.replace(lowering, conversions=(*lowering.conversions, host_lengths.READ))

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        if plan.spec.packed:
            return _attend_packed(plan, query, key, value, parts)
        return _dense.attend(plan, query, key, value, parts, _call)


def _packs(spec: AttentionSpec) -> bool:
    """Whether the kernel takes packed sequences; otherwise they are padded.

    Its causal modes leave rows without a key if lengths differ; windows would need a dense mask.
    """
    pattern = spec.mask.pattern
    full = pattern is None or pattern.left == pattern.right == -1
    causal = pattern is not None and pattern.is_causal and spec.same_lengths
    few = spec.batch <= _MOST_PACKED and spec.batch * max(spec.seqlen_q, spec.seqlen_kv) <= _MOST_TOKENS
    return few and (full or causal) and not (spec.return_lse or spec.sinks)


def _attend_packed(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
    spec, starts_q, starts_k = plan.spec, parts.cu_seqlens_q, parts.cu_seqlens_k
    assert starts_q is not None
    assert starts_k is not None
    if plan.lowering.copy:
        query, key, value = realigned(query), realigned(key), realigned(value)

    def kernel(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> tuple[Tensor, None]:
        result = FUNCTIONS[plan.backend].npu_fusion_attention(
            query,
            key,
            value,
            spec.num_heads,
            "TND",
            actual_seq_qlen=list(itertools.accumulate(sequences.lengths_q)),
            actual_seq_kvlen=list(itertools.accumulate(sequences.lengths_k)),
            **_options(plan, query.device),
        )
        return result[0], None

    return host_lengths.attend(spec, query, key, value, starts_q, starts_k, kernel, with_lse=False)[0]


def _options(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return the arguments that don't depend on the layout: scale, dropout and a causal pattern."""
    spec, pattern = plan.spec, plan.lowering.pattern
    options: dict[str, Any] = {"scale": spec.scale, "keep_prob": 1.0 - spec.dropout_p}
    if plan.lowering.is_causal and pattern is not None:
        options["sparse_mode"] = _UPPER_LEFT if pattern.align == "upper_left" else _LOWER_RIGHT
        options["atten_mask"] = _compressed(device)
    return options


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    spec = plan.spec
    options = _options(plan, call.query.device)
    if not plan.lowering.is_causal and call.mask is not None:
        options["atten_mask"] = _hidden(spec, call)
    if call.live is not None:
        options["inner_precise"] = _INVALID_ROWS
    layout = "BSND" if spec.layout == "BSHD" else "BNSD"
    function = FUNCTIONS[plan.backend].npu_fusion_attention
    result = function(call.query, call.key, call.value, spec.num_heads, layout, **options)
    if not (spec.return_lse or plan.rescale):
        return result[0], None
    # Two float32 tensors (B, N, S_q, 8); the eight numbers of a row are equal.
    largest, total = result[1][..., 0], result[2][..., 0]
    return result[0], largest + total.log()


@functools.lru_cache(maxsize=16)
def _compressed(device: torch.device) -> Tensor:
    """Return the mask that the causal modes expect for all lengths, made once per device."""
    with torch.inference_mode(False):
        return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu(1)


def _hidden(spec: AttentionSpec, call: KernelCall) -> Tensor:
    """Convert the mask to the kernel's: True is masked, and only heads, and then batch, may have size 1."""
    mask = call.mask
    assert mask is not None
    hidden = ~mask
    if call.live is not None:
        # A row without a key sees every key, since the kernel's result is unspecified otherwise, in its backward too.
        # `attend` sets the row to zero.
        hidden = hidden & call.live.unsqueeze(-1)
    axis = 1 if spec.layout == "BSHD" else 2
    lengths = (call.query.shape[axis], call.key.shape[axis])
    heads = hidden.shape[1]
    batch = call.query.shape[0] if heads > 1 else hidden.shape[0]
    return hidden.expand(batch, heads, *lengths).contiguous()
