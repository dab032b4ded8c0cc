"""SageAttention 3 in fp4, from the Hub, for NVIDIA GPUs of sm120: never run on a real one.

Source: Diffusers 0.42.1, `models/attention_dispatch.py`, and the kernel's own `sageattn3_blackwell`, by reading. It
takes `(B, H, S, D)`, contiguous. It ignores `attn_mask` and unknown keywords, including scale: its scale is `D**-0.5`.
It subtracts the mean from key in place, so it gets a copy. It needs as many key heads as query heads; the output has no
gradient, and there is no lse. Causal attention with unequal lengths, torch.compile and CUDA graphs were never tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import KernelCall
from anyattn.backend.capabilities import BOTH, Capabilities
from anyattn.backend.from_hub import FromHub
from anyattn.backend.protocol import Lowering, Output, Parts, Plan
from anyattn.environment import Environment
from anyattn.sources.hub import DIFFUSERS, HubKernel
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_CUDA = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16)),
    arch_min=(12, 0),
    # 12.1 isn't in the build (kernels-community pull request 1099).
    arch_max=(12, 0),
    head_dim_max=128,
    head_dim_multiple=64,
    causal=BOTH,
    causal_square=True,
    quantised="fp4",
    unit_stride=False,
    batch_max=65535,
    device_guard=True,
    default_stream=True,  # which stream its launches use wasn't read: this is right for any
)


class SageBlackwellHub(FromHub):
    """SageAttention 3, scores, weights and value in fp4; forward only."""

    name = "sage_blackwell_hub"
    family = "sage_blackwell"
    # `sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs)`, `(B, H, S, D)`.
    hub = HubKernel(
        "SageAttention/sage-blackwell",
        ("sageattn3_blackwell",),
        version=1,
        source=DIFFUSERS,
        note="SageAttention 3, another kernel than sage-attention's",
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _CUDA}

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        # The default is 1 / sqrt(D), which for D = 128 is another float than D ** -0.5.
        if not math.isclose(spec.scale, spec.head_dim**-0.5):
            need = f"scale=None, which is head_dim ** -0.5 ({spec.head_dim**-0.5})"
            yield Reason("scale", need, str(spec.scale), "multiply query by the quotient of the two")
        if spec.mask.pattern is not None and not spec.same_lengths:
            yield Reason("mask", "seqlen_q == seqlen_kv for causal", f"{spec.seqlen_q} and {spec.seqlen_kv}")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        return _flash.lower("sageattn3_blackwell", self.declarations[spec.device_type], spec, head_dim_multiple=1)

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, _call)


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, None]:
    query, value = (tensor.transpose(1, 2).contiguous() for tensor in (call.query, call.value))
    key = call.key.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # it is written to
    causal = call.left == -1 and call.right == 0
    out: Tensor = FUNCTIONS[plan.backend].sageattn3_blackwell(query, key, value, is_causal=causal)
    return out.transpose(1, 2), None
