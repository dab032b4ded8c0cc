"""torch's FlexAttention: compiled if that is worth it, else eager; the decision says which.

Sources: torch 2.13 `torch/nn/attention/flex_attention.py` and `torch/_higher_order_ops/flex_attention.py`, run on a
CPU; an H100 with torch 2.11. Compiled code doesn't check lengths and heads, so calls are checked before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from anyattn.adapters.flex import kernels
from anyattn.backend.capabilities import BOTH, Capabilities
from anyattn.backend.declared_reasons import lowered_mask_reasons
from anyattn.backend.known_bad.table import hits
from anyattn.backend.protocol import Backend, Lowering
from anyattn.environment import Environment
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import UNKNOWN, AttentionSpec

_CPU = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    head_dim_max=1 << 20,
    head_dim_v=True,
    causal=BOTH,
    window=BOTH,
    window_any_right=True,
    key_mask=True,
    key_and_pattern=True,
    boolean=True,
    bias=True,
    bias_float32=True,
    block=True,
    dead_rows=True,
    gqa=True,
    softcap=True,
    scale_any=True,
    lse=True,
    exact=True,
    unit_stride=False,
    # Inductor's kernels need no alignment, or copy inputs themselves.
    aligned=False,
    compile=True,
)

_CUDA = _CPU.replace(
    dtypes=frozenset((torch.float16, torch.bfloat16, torch.float32)),
    arch_min=(7, 5),
    head_dim_max=256,
    head_dim_min=16,
    backward=True,
    deterministic=False,
    # A launch dimension is batch * heads: in every kernel before torch 2.9, since then in the one for short queries.
    batch_heads_max=65535,
    cuda_graph=True,
)

_PAYS_ON_CPU = 1 << 22
"""From this many scores (batch * heads * seqlen_q * seqlen_kv) compiling for the CPU is worth its seconds."""

_HELD = "all scores are in memory"


class Flex(Backend):
    """FlexAttention: every mask, bias and softcap in one kernel."""

    name = "flex"
    family = "flex"
    aliases = ("flex_attn",)
    auto_rank = 80
    slow_start = True
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cpu": _CPU, "cuda": _CUDA}
    run = staticmethod(kernels.run)

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.device_type == "cpu" and spec.compiled and (spec.return_lse or spec.sinks):
            yield Reason("lse", "no lse under torch.compile on a CPU (inductor has none)", "return_lse or sinks")
        dense = spec.mask.dense
        joined = spec.mask.pattern is not None or spec.mask.key is not None
        if joined and dense is not None and dense.kind == "bias" and (spec.return_lse or spec.sinks):
            # The lse of rows with only huge biases is corrected from the whole mask.
            yield from lowered_mask_reasons(spec)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        if _mixes_names_up(spec):
            text = "computed without flex_attention: inductor's C++ for dynamic lengths and mask tensors is invalid"
            return Lowering(kernels.WRITTEN_OUT, compiled=True, conversions=(Conversion("written_out", text),))
        compiled, why = _compiles(spec, env)
        entry = "flex_attention (compiled)" if compiled else "flex_attention (eager)"
        notes = [Conversion("compiled" if compiled else "eager", why)]
        rows = hits(("flex (compiled)",), spec, env) if compiled else ()
        found = {row.name: row for row in rows}
        tail = found.get("flex-cpu-tail")
        strides = found.get("flex-cpu-strides") or found.get("flex-cuda-strides")
        if tail is not None:
            text = f"keys padded to a multiple of 16 and masked, to avoid {tail.what} ({tail.link})"
            notes.append(Conversion("pad_keys", text))
        if strides is not None:
            text = f"query, key and value made contiguous, to avoid {strides.what} ({strides.link})"
            notes.append(Conversion("copy", text))
        if spec.mask.block is not None and spec.mask.block.is_partial:
            text = "block mask made again for every head and batch entry: it had blocks of the first only"
            notes.append(Conversion("rebuild_block_mask", text))
        return Lowering(
            entry,
            copy=strides is not None,
            compiled=compiled,
            pad_keys=tail is not None,
            conversions=tuple(notes),
        )

    def load(self) -> None:
        import torch.nn.attention.flex_attention  # noqa: F401


def _mixes_names_up(spec: AttentionSpec) -> bool:
    """Whether inductor's C++ for a traced call may not compile, because it confuses names of sizes.

    In torch 2.13 names of block sizes, such as ks1, are replaced textually, also inside ks14. With dynamic lengths,
    mask tensors add such names.
    """
    block = spec.mask.block
    if block is not None and not block.is_function:
        return False
    tensors = spec.mask.key or spec.mask.dense or (block is not None and block.per_batch)
    dynamic = UNKNOWN in (spec.batch, spec.seqlen_q, spec.seqlen_kv)
    return bool(spec.compiled and spec.device_type == "cpu" and dynamic and tensors)


def _compiles(spec: AttentionSpec, env: Environment) -> tuple[bool, str]:
    if spec.compiled:
        return True, "traced into the caller's torch.compile"
    if spec.device_type == "cuda":
        return True, "compiled by torch.compile at the first call of this kind"
    if spec.batch * spec.num_heads * spec.seqlen_q * spec.seqlen_kv < _PAYS_ON_CPU:
        return False, f"eager: too small to be worth compiling ({_HELD})"
    if not env.cxx:
        return False, f"eager: there is no C++ compiler for torch.compile ({_HELD})"
    if spec.return_lse or spec.sinks:
        return False, f"eager: compiled code returns no lse on a CPU ({_HELD})"
    if spec.dtype == torch.float64:
        return False, f"eager: float64 isn't compiled ({_HELD})"
    return True, "compiled by torch.compile at the first call of this kind"
