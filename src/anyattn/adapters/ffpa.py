"""FFPA: exact attention for head dims above 256, as VAEs have them; the Triton kernel of the package ffpa-attn.

Source: `ffpa_attn/triton/` of ffpa-attn 0.2.4; run on an H200. The operator that the package registers is called
itself: `ffpa_attn_func` silently goes to SDPA for short sequences and other head dims, where causal is aligned
differently. Causal is aligned to the lower right and needs as many keys as queries. lse is natural, padded to a
multiple of 128 queries. A scale of 0 would mean the default. It takes masks too, but gives NaN where one forbids the
first keys of a row, so none is declared; its backward isn't used. On an H200 with torch 2.11 it was 0.4 to 1.0 times as
fast as SDPA (head dims 384 to 1024, 1024 to 16384 tokens), so `auto` tries it after `native`. Its experimental form for
TMA was up to 1.45 times as fast with head_dim 512, but out of memory or NaN for other calls; it isn't used.

The package requires versions of quack-kernels and nvidia-cutlass-dsl for kernels that aren't used here, and which
flash-attn-4 can't use: install it without its dependencies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import KernelCall, bound
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Runner
from anyattn.environment import Environment
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Reason
from anyattn.types.spec import UNKNOWN, AttentionSpec

_OPERATOR = "_fwd_triton"
_ARGUMENTS = (
    *("q", "k", "v", "attn_bias", "softmax_scale", "causal", "autotune", "autotune_mode_is_max", "dropout_p"),
    *("philox_seed", "philox_offset", "enable_tma", "enable_ws"),
)

_CUDA = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16)),
    arch_min=(8, 0),
    head_dim_max=1024,
    causal=frozenset(("lower_right",)),
    realigns=True,
    dead_rows=True,
    gqa=True,
    lse=True,
    exact=True,
    aligned=False,
    unit_stride=False,
    # The launch grid's second dimension holds batch * num_heads.
    batch_heads_max=65535,
    device_guard=True,
    compile=True,
    cuda_graph=True,
)


class Ffpa(Backend):
    """FFPA's Triton kernel, forward only."""

    name = "ffpa"
    family = "ffpa"
    aliases: ClassVar[tuple[str, ...]] = ("ffpa_attn",)
    auto_rank = 65
    packages: ClassVar[tuple[Package, ...]] = (
        Package(
            "ffpa-attn",
            "ffpa_attn.triton",
            (),
            ">=0.2.4,<0.3",
            install="pip install --no-deps {requirement}",
            found_by="ffpa_attn",
        ),
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _CUDA}

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        pattern = spec.mask.pattern
        known = UNKNOWN not in (spec.seqlen_q, spec.seqlen_kv)
        if pattern is not None and pattern.is_causal and not spec.same_lengths:
            if pattern.align == "lower_right" and (not known or spec.seqlen_kv < spec.seqlen_q):
                yield Reason("mask", "as many keys as queries, or more, for causal", f"{spec.seqlen_q} queries")
            if pattern.align == "upper_left" and not known:
                yield Reason("mask", "lengths that are known, for causal", "lengths that aren't")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        return _flash.lower(_OPERATOR, self.declarations[spec.device_type], spec)

    def prepare(self, functions: Any) -> Any:
        operator = getattr(getattr(torch.ops.ffpa_attn, _OPERATOR, None), "default", None)
        found = [] if operator is None else [argument.name for argument in operator._schema.arguments]
        if found != list(_ARGUMENTS):
            raise ImportError(f"ffpa_attn.triton registers no operator {_OPERATOR} with the arguments of 0.2.4")
        functions.operator = operator
        return functions

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, _call)

    def length_period(self, spec: AttentionSpec) -> int:
        return 1

    def bind(self, plan: Plan) -> Runner | None:
        pattern, operator = plan.lowering.pattern, FUNCTIONS[plan.backend].operator
        causal = pattern is not None and pattern.right == 0
        constants = _constants(plan, causal)

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = operator(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *constants)
            return out.transpose(1, 2), lse[..., : query.shape[1]]

        return bound.bind(plan, kernel)

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        return bound.without_mask(self.bind(plan))


def _constants(plan: Plan, causal: bool) -> tuple[Any, ...]:
    """Return the operator's arguments after the tensors: no bias, no tuning, no dropout."""
    return (None, plan.spec.scale, int(causal), 0, 0, 0.0, 0, 0, 0, 0)


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    tensors = (tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value))
    out, lse = torch.ops.ffpa_attn._fwd_triton(*tensors, *_constants(plan, call.left == -1 and call.right == 0))
    return out.transpose(1, 2), lse[..., : call.max_seqlen_q]
