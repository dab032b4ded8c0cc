"""torch's scaled_dot_product_attention: torch's own pick, or one of its kernels.

A single kernel is called through its aten op, never through `torch.nn.attention.sdpa_kernel`, which sets flags of the
whole process: one thread's choice would change another's.
Source: torch 2.13 `torch/nn/attention/__init__.py` (sdpa_kernel), `torch/nn/attention/bias.py` (raw op).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from anyattn.adapters.native import kernels, mps, packed, replaced, short
from anyattn.adapters.native.declarations import CUDNN, EFFICIENT, FLASH, MATH, NATIVE
from anyattn.adapters.native.reaching import dense_causal_reasons, lower_to
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.known_bad.table import hits
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Plan, Runner
from anyattn.environment import Environment
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec


class _Kernel(Backend):
    """One SDPA kernel, called through its aten op."""

    family = "native"
    entries: ClassVar[Mapping[str, str]]
    # Known-bad rows that aren't reasons: the lowering avoids them, or the declaration refuses them already.
    avoids: ClassVar[frozenset[str]] = frozenset()
    run = staticmethod(kernels.run)

    def length_period(self, spec: AttentionSpec) -> int:
        return 1

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        return dense_causal_reasons(self.entries[spec.device_type], spec)

    def known_bad(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        return (row.reason() for row in hits((self.name,), spec, env) if row.name not in self.avoids)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        caps = self.declarations[spec.device_type]
        return lower_to(self.entries[spec.device_type], caps, spec, env)

    def bind(self, plan: Plan) -> Runner | None:
        return short.bind_kernel(plan)

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        bound = self.bind(plan)
        return None if bound is None else lambda query, key, value, attn_mask: bound(query, key, value)


class NativeFlash(_Kernel):
    """SDPA's flash kernel."""

    name = "native_flash"
    aliases = ("_native_flash",)
    entries = {"cpu": "flash_cpu", "cuda": "flash"}
    declarations = FLASH
    avoids = frozenset(
        ("cpu-flash-causal-scale", "cpu-flash-float32-bias", "cpu-flash-shared-heads", "dropout-of-everything")
    )

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = super().capabilities(spec, env)
        return packed.declared(caps) if caps is not None and packed.takes(spec, env) else caps

    def origin(self, env: Environment) -> str:
        return replaced.origin(env, ("native_flash", "varlen_attn"))

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        yield from replaced.flash_reasons(spec, env)
        if not spec.packed:
            yield from super().rejects(spec, env)
        elif packed.may_be_cudnn(spec, env):
            yield Reason("setting", "a packed call that torch runs on its flash kernel", packed.CUDNN, "choose native")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        return packed.lower(spec, packed.kernel_of(spec, env)) if spec.packed else super().lower(spec, env)


class NativeEfficient(_Kernel):
    """SDPA's memory-efficient kernel."""

    name = "native_efficient"
    aliases = ("_native_efficient",)
    auto_rank = 50
    entries = {"cuda": "efficient"}
    declarations = EFFICIENT
    avoids = frozenset(("efficient-expanded-kv", "dropout-of-everything"))


class NativeCudnn(_Kernel):
    """SDPA's cuDNN kernel."""

    name = "native_cudnn"
    aliases = ("_native_cudnn",)
    entries = {"cuda": "cudnn"}
    declarations = CUDNN
    # What is wrong there is how SDPA makes the mask additive; the op is called without SDPA.
    avoids = frozenset(("cudnn-dead-rows", "dropout-of-everything"))

    @property
    def needs(self) -> str:
        return f"{super().needs}, with cuDNN"

    def origin(self, env: Environment) -> str:
        return replaced.origin(env, ("native_cudnn",))

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from super().availability(env)
        if env.cudnn is None and env.device("cuda") is not None:
            yield Reason("not_installed", "cuDNN", "a torch without it", "install a CUDA build of torch with cuDNN")

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.deterministic:
            yield Reason("deterministic", "torch.use_deterministic_algorithms(False)", "True")
        if spec.dropout_p and (spec.dropout_p * 16) % 1:
            yield Reason("dropout", "a dropout_p that is a multiple of 1/16", str(spec.dropout_p))
        if spec.dropout_p and spec.seqlen_q == 1:
            yield Reason("dropout", "seqlen_q > 1 with dropout", "1")
        if spec.dropout_p and env.cudnn is not None and (9, 11) <= env.cudnn[:2] <= (9, 13):
            yield Reason("dropout", "cuDNN outside 9.11 to 9.13", ".".join(map(str, env.cudnn)))


class NativeMath(_Kernel):
    """SDPA's plain computation: it has every feature, and holds all scores in memory."""

    name = "native_math"
    aliases = ("_native_math",)
    auto_rank = 90
    entries = {"cpu": "math", "cuda": "math", "mps": "math", "xpu": "math"}
    declarations = MATH


_FUSED = (NativeCudnn(), NativeFlash(), NativeEfficient())
_MATH = NativeMath()


class Native(Backend):
    """torch's own pick among the SDPA kernels, steered around those that are wrong for the call."""

    name = "native"
    auto_rank = 10
    family = "native"
    declarations = NATIVE
    bound_traces = True
    run = staticmethod(kernels.run)

    def origin(self, env: Environment) -> str:
        return replaced.origin(env)

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = super().capabilities(spec, env)
        return packed.declared(caps) if caps is not None and packed.takes(spec, env) else caps

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.packed:
            return
        yield from dense_causal_reasons("sdpa", spec)
        if spec.return_lse or spec.sinks:
            options = _with_lse(spec, env)
            if not any(not sub.reasons(spec, env) for sub in options):
                for sub in options:
                    yield from sub.reasons(spec, env)
                if not options:
                    yield Reason("lse", "a device whose SDPA kernels return lse (cpu, cuda)", spec.device_type)

    def known_bad(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        # `lower` avoids every other row by a kernel that is right.
        return mps.known_bad(spec, env) if spec.device_type == "mps" else iter(())

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        if spec.packed:
            return packed.lower(spec, packed.kernel_of(spec, env))
        if spec.forward_ad:
            sent = Conversion("steered", "sent to native_math: torch's other kernels have no forward-mode AD")
            lowering = lower_to("math", self.declarations[spec.device_type], spec, env)
            return dataclasses.replace(lowering, conversions=(sent, *lowering.conversions))
        if spec.return_lse or spec.sinks:
            return next(sub.lower(spec, env) for sub in _with_lse(spec, env) if not sub.reasons(spec, env))
        plain = lower_to("sdpa", self.declarations[spec.device_type], spec, env)
        if spec.device_type == "cuda":
            return _steer(plain, spec, env)
        return mps.lower(plain, spec, env) if spec.device_type == "mps" else plain

    def length_period(self, spec: AttentionSpec) -> int:
        return 32 if spec.device_type == "mps" else 1  # see `known_bad.mps`

    def bind(self, plan: Plan) -> Runner | None:
        return short.bind_sdpa(plan)

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        return short.bind_sdpa_masked(plan)


def _with_lse(spec: AttentionSpec, env: Environment) -> tuple[_Kernel, ...]:
    wanted: Any = [sub for sub in _by_priority(spec, env) if spec.device_type in sub.declarations]
    return tuple(sub for sub in wanted if sub.declarations[spec.device_type].lse)


def _by_priority(spec: AttentionSpec, env: Environment) -> tuple[_Kernel, ...]:
    """Return the kernels in the order in which torch tries them.

    Source: `sdp_utils.cpp` of torch, `priority_order`: cuDNN comes first on sm90 and sm100 if it is newer than 9.15,
    and last otherwise.
    """
    cudnn, flash, efficient = _FUSED
    device = env.device(spec.device_type, spec.device_index)
    arch = device.arch if device is not None else None
    if arch is not None and arch[0] in (9, 10) and env.cudnn is not None and env.cudnn > (9, 15, 0):
        return (cudnn, flash, efficient, _MATH)
    return (flash, efficient, _MATH, cudnn)


def _steer(plain: Lowering, spec: AttentionSpec, env: Environment) -> Lowering:
    """Steer a CUDA call around the kernels that are wrong for it; torch picks only if every pick is right."""
    rows = hits([Native.name, *(sub.name for sub in _FUSED)], spec, env)
    misaligned = not (spec.storage.aligned and spec.storage.unit_stride and spec.storage.mask_aligned)
    # A replacement of the flash kernel raises on calls that torch's own would run or leave to another kernel.
    lost = tuple(replaced.flash_reasons(spec, env))
    if not rows and not misaligned and not lost:
        return plain
    first = _by_priority(spec, env)[0]
    fixable = not misaligned and not lost and {row.name for row in rows} == {"cudnn-dead-rows"} <= first.avoids
    if fixable and not first.reasons(spec, env):
        note = Conversion("additive_mask", f"the mask made additive, with -inf: {rows[0].what} ({rows[0].link})")
        return dataclasses.replace(plain, entry="sdpa_additive", conversions=(note, *plain.conversions))
    causes = [f"{row.what} with {row.backends[0]} for {row.when}" for row in rows]
    causes += [f"native_flash needs {reason.need}, got {reason.got}" for reason in lost]
    why = "; ".join(causes)
    dense = spec.mask.dense
    if dense is not None and dense.kind == "bias" and dense.dtype == torch.float32 and spec.dtype.itemsize == 2:
        wide = spec.replace(dtype=dense.dtype)
        efficient = _FUSED[2]
        if not efficient.reasons(wide, env):
            note = Conversion("steered", f"sent to {efficient.name} in {dense.dtype}, the mask's own dtype: {why}")
            lowering = efficient.lower(wide, env)
            return dataclasses.replace(lowering, upcast=True, conversions=(note, *lowering.conversions))
    for sub in _by_priority(spec, env):
        if not sub.reasons(spec, env):
            lowering = sub.lower(spec, env)
            note = Conversion("steered", f"sent to {sub.name}: {why or 'storage is not aligned for every kernel'}")
            return dataclasses.replace(lowering, conversions=(note, *lowering.conversions))
    raise AssertionError(f"native_math takes every call that native declares, but refused {spec}")
