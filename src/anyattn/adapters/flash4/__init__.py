"""FlashAttention-4: the package flash-attn-4 (`flash_attn.cute`), compiled by its CUTLASS DSL at a kernel's first call.

Sources: `flash_attn/cute/interface.py` of flash-attention, betas 0 to 36; 4.0.0b36 on an H100. Its checks are assert
statements, which `python -O` drops, so none is relied on. A window's unbounded side is None: -1 would be an offset.
The first call of each kind (dtype, head_dim, pattern, with or without lengths, lse, gradients) compiles for seconds.

Its backward for sm90 rounds head_dim up to a multiple of 16 (`flash_bwd_sm90.py`), and its postprocessing to one of 32
(`flash_bwd_postprocess.py`). If these differ, and there are several tiles, gradients are silently wrong (head_dim 40,
72 and 80 on an H100). If head_dim_v != head_dim, some pairs don't compile or can't be launched ((64, 128), (64, 96),
(128, 32)). So both are padded to the same multiple of 32 for gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import KernelCall, bound
from anyattn.adapters.flash4 import kernels
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.from_hub import FromHub
from anyattn.backend.head_dims import HeadDims
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Runner
from anyattn.environment import Arch, Environment
from anyattn.sources.hub import DIFFUSERS, HubKernel
from anyattn.sources.packages import Package
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

_CUDA = _flash.DECLARED.replace(
    arch_min=(9, 0),
    # sm120 and sm121 use another kernel, which was wrong or made illegal accesses up to b29 (flash-attention issues
    # 2386, 2453 and pull request 2860). Later betas were never run there, and nothing on sm110.
    arch_max=(10, 3),
    # `_validate_head_dims`.
    head_dims=(
        HeadDims(9, 256),
        HeadDims(10, 128, pairs=((192, 128),), plain_pairs=((256, 256),)),
    ),
    head_dim_v=True,
    window_any_right=True,
    softcap=True,
    sinks=True,
    # Through anyattn's own operators, since torch.compile skips the package's function.
    compile=True,
    cuda_graph=True,
)


class Flash4(Backend):
    """FlashAttention-4, dense and varlen, with learnable sinks."""

    name = "flash4"
    family = "flash4"
    aliases: ClassVar[tuple[str, ...]] = ("flash_attn_4", "_flash_4")
    auto_rank = 20
    packages: ClassVar[tuple[Package, ...]] = (
        Package(
            "flash-attn-4",
            "flash_attn.cute",
            _flash.FUNCTIONS,
            install="pip install --pre {requirement}",
            note="flash-attn 2.8.0 to 2.8.3.post1 bring an old flash_attn.cute that shadows it",
        ),
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _CUDA}

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.needs_grad and spec.is_gqa and spec.head_dim != spec.head_dim_v:
            got = f"{spec.head_dim} and {spec.head_dim_v} with {spec.num_heads} heads on {spec.num_kv_heads}"
            yield Reason("head_dim_v", "head_dim_v == head_dim for gradients of shared heads", got)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        entry = "flash_attn_func" if spec.mask.key is None and not spec.packed else "flash_attn_varlen_func"
        caps, arch = self.declarations[spec.device_type], _arch(spec, env)
        if spec.needs_grad and arch[0] == 9:
            # See the module's docstring, and `flash4-backward-head-dims` in the known-bad table.
            lowering = _flash.lower(entry, caps, spec, head_dim_multiple=32, same_head_dims=True)
        else:
            lowering = _flash.lower(entry, caps, spec)
        note = Conversion("compiles_first", "the first call of a kind compiles its kernel, which takes seconds")
        return dataclasses.replace(lowering, conversions=(*lowering.conversions, note))

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        def kernel(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
            return kernels.attend(plan, call, parts.sinks)

        return _flash.attend(plan, query, key, value, parts, kernel)

    def length_period(self, spec: AttentionSpec) -> int:
        return 1

    def bind(self, plan: Plan) -> Runner | None:
        return None if _is_special(plan) else bound.bind(plan, kernels.bound_to(plan, lengths=False))

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        if plan.spec.mask.key is None:
            return bound.without_mask(self.bind(plan))
        return None if _is_special(plan) else bound.bind_lengths(plan, kernels.bound_to(plan, lengths=True))


def _is_special(plan: Plan) -> bool:
    """Whether key and value must be two objects: one for both selects another formula if D_v is 512."""
    return plan.spec.head_dim_v == 512


def _arch(spec: AttentionSpec, env: Environment) -> Arch:
    """Return a call's compute capability; if unknown, the one whose backward takes the least."""
    device = env.device(spec.device_type, spec.device_index)
    return (9, 0) if device is None or device.arch is None else device.arch


class Flash4Hub(FromHub, Flash4):
    """The same from the Hub, an earlier beta; arguments are passed by keyword, since their order differs."""

    name = "flash4_hub"
    aliases = ("flash_4_hub",)
    # A beta of FlashAttention-4 before beta9 (`torch-ext/flash_attn4/__init__.py` says which): the fourth positional
    # argument is softmax_scale, and qv, gather_kv_indices, min_seqlen_k and aux_scalars don't exist. It always returns
    # a tuple. Importing it replaces `cutlass.cute.compile` for the whole process. It needs nvidia-cutlass-dsl.
    hub = HubKernel(
        "kernels-community/flash-attn4",
        _flash.FUNCTIONS,
        version=0,
        source=DIFFUSERS,
        note="4.0.0.beta8 at most: the fourth argument is softmax_scale, not qv",
    )
