"""FlashAttention-3: a build of `hopper/` (flash_attn_interface, flash_attn_3), tokenspeed-fa3, or the package fa3-fwd.

Sources: `hopper/flash_attn_interface.py` and `hopper/flash_api.cpp` of flash-attention; fa3-fwd 0.0.3 on an H100.
Causal and windows are aligned to the lower right. What a function returns changed twice under one version number, so it
is found from its signature and its result.

Builds leave features out, and most list them in a module of plain Python (`Environment.builds`). A call that needs such
a feature is refused; without that module every feature counts as left out, except in flash-attention's own
distribution. A build without backward accepts a call with gradients, and raises in the backward.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import KernelCall, bound
from anyattn.adapters.flash3 import kernels
from anyattn.adapters.flash3.builds import (
    BUILD,
    FORWARD_ONLY,
    PACKAGES,
    Build,
    config_of,
    is_own,
    of_build,
    rejected,
)
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.from_hub import FromHub
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Runner
from anyattn.environment import Environment
from anyattn.sources.hub import HubKernel
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

_CUDA = _flash.DECLARED.replace(
    arch_min=(9, 0),
    arch_max=(9, 0),
    head_dim_max=512,
    head_dim_v=True,
    window_any_right=True,
    softcap=True,
    compile=True,
    cuda_graph=True,
)


class Flash3(Backend):
    """FlashAttention-3 in the inputs' precision, without the features that its build left out."""

    name = "flash3"
    family = "flash3"
    aliases: ClassVar[tuple[str, ...]] = ("_flash_3", "_flash_varlen_3", "flash_attn_3")
    auto_rank = 30
    packages: ClassVar[tuple[Package, ...]] = PACKAGES
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _CUDA}

    def origin(self, env: Environment) -> str:
        package = self.package(env)
        if package is None:
            return ""
        flags = env.builds.get(config_of(package))
        absent = [] if flags is None else sorted(name for name, is_out in flags.items() if is_out)
        without = f", built without {', '.join(absent)}" if absent else ""
        unknown = flags is None and package is not FORWARD_ONLY and not is_own(package, env)
        return f"{super().origin(env)}{without}{', with unknown build options' if unknown else ''}"

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = super().capabilities(spec, env)
        package = self.package(env)
        return caps if caps is None or package is None else of_build(caps, Build(package, env))

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        package = self.package(env)
        yield from rejected(spec, None if package is None else Build(package, env))

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        caps = self.capabilities(spec, env)
        assert caps is not None
        # Lengths beside unpacked keys were shown to work in the forward only; the backward takes packed keys.
        packs = spec.needs_grad
        entry = "flash_attn_func" if spec.mask.key is None and not spec.packed else "flash_attn_varlen_func"
        return _flash.lower(entry, caps, spec, packs=packs)

    def prepare(self, functions: Any) -> Any:
        # Builds without this parameter return lse always or never.
        functions.asks_for_lse = "return_attn_probs" in inspect.signature(functions.flash_attn_func).parameters
        functions.operator = kernels.operator_of(functions.module)
        return functions

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, kernels.call)

    def length_period(self, spec: AttentionSpec) -> int:
        return 1

    def bind(self, plan: Plan) -> Runner | None:
        if plan.spec.return_lse and not FUNCTIONS[plan.backend].asks_for_lse:
            return None
        return bound.bind(plan, kernels.bound_to(plan, lengths=False))

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        if plan.spec.mask.key is None:
            return bound.without_mask(self.bind(plan))
        return bound.bind_lengths(plan, kernels.bound_to(plan, lengths=True))


_FP8 = _CUDA.replace(
    dtypes=frozenset((torch.float16, torch.bfloat16)),
    head_dim_max=256,
    head_dim_v=False,
    window=frozenset(),
    backward=False,
    deterministic=False,
    softcap=False,
    exact=False,
    quantised="fp8",
    varlen=False,
)

_LARGEST_E4M3 = 448.0


class Flash3Fp8(Flash3):
    """FlashAttention-3 in fp8 (e4m3): half-precision inputs are quantised with a scale per batch entry and head."""

    name = "flash3_fp8"
    quantises = True
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _FP8}

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from super().availability(env)
        package = self.package(env)
        if package is not None and not Build(package, env).has("FP8"):
            yield Reason("not_installed", "FlashAttention-3 with FP8", self.origin(env), f"{BUILD} with every feature")

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = self.declarations.get(spec.device_type)
        package = self.package(env)
        if caps is None or package is None:
            return caps
        # Inputs reach the kernel in fp8, so a build without fp16 takes float16 too.
        return of_build(caps, Build(package, env)).replace(dtypes=caps.dtypes)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        entry = "flash_attn_func" if spec.mask.key is None else "flash_attn_varlen_func"
        lowering = _flash.lower(entry, _FP8, spec, head_dim_multiple=16)
        note = Conversion("quantised", "query, key and value as e4m3, with a scale per batch entry and head")
        return dataclasses.replace(lowering, conversions=(note, *lowering.conversions))

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, _call_fp8)


def _call_fp8(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    dtype, kv_heads = call.query.dtype, call.key.shape[2]
    query, q_descale = _quantised(call.query, kv_heads)
    key, k_descale = _quantised(call.key, kv_heads)
    value, v_descale = _quantised(call.value, kv_heads)
    call = KernelCall(query, key, value, *call[3:])
    out, lse = kernels.call(plan, call, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return out.to(dtype), lse


def _quantised(tensor: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Return a tensor as e4m3, and the factor that restores it: float32 `(B, H_kv)`."""
    grouped = tensor.unflatten(2, (kv_heads, -1))  # type: ignore[no-untyped-call]
    # The kernel multiplies the scale by those of query and key, and gives NaN if the product is 0.
    largest = grouped.abs().amax((1, 3, 4)).float().clamp_min(2.0**-40)
    descale = largest / _LARGEST_E4M3
    scaled = grouped * (1.0 / descale)[:, None, :, None, None].to(torch.float32)
    return scaled.flatten(2, 3).to(torch.float8_e4m3fn), descale


class Flash3Hub(FromHub, Flash3):
    """The same from the Hub: a build of `hopper/` against torch's stable ABI."""

    name = "flash3_hub"
    aliases = ("_flash_3_hub", "_flash_3_varlen_hub")
    # Signatures and conventions are those of flash_attn_interface since 2025-08-29: `return_attn_probs=True` returns
    # `(out, lse)`, and without it only out. CUDA 12.6 to 13.0, sm90.
    hub = HubKernel(
        "kernels-community/flash-attn3",
        _flash.FUNCTIONS,
        revision="43f0bd269777115d94ff826e0d113ce9c1c9087b",
        source="a build against torch's stable ABI (2.9 and newer); the public projects wan-trainer and lightx2v_train "
        "record that they run it",
        note="lse comes with return_attn_probs=True",
    )

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        return self.declarations.get(spec.device_type)  # the installed package isn't what is called

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        yield from rejected(spec, None)
