"""SageAttention 2: its own pick, and four of its kernels by name; the package sageattention, from its sources.

Sources: `sageattention/core.py`, `sageattention/triton/` and `csrc/` of SageAttention 2.1.1 to 2.2.0; a build of 2.2.0
on an H100. Query and key are quantised to int8, and weights and value to fp16 or fp8. A result's relative error is
about 3e-2 (in the 2-norm; a bf16 kernel's is 2e-3). Forward only: the output silently has no gradient. Causal is
aligned to the upper left; lse is natural, float32 and `(B, H, S_q)`.

Every function ignores unknown keywords, so `load` checks that it has those used here. Dense masks aren't declared: the
Triton kernel's `attn_mask` adds biases to base-2 scores, and is wrong for rows without a key. Calls under torch.compile
are refused, since a build's version doesn't show whether it can be traced.

`sage` and `sage_int8_fp16_triton` use `sageattn_varlen` for packed sequences and key masks. It is a Triton kernel on
every GPU: scores in int8, value in fp16, no lse, causal aligned to the upper left of each sequence. It waits for the
device (see `packed`). A call's declaration is that of the function it uses. A packed call counts as if all its
sequences had the longest one's length.

At some lengths the two fp16 kernels read uninitialised memory; there they get whole tiles (see `tiles`).

The fp16 kernels cast value, and bf16 values above 65504 (from 1024 on in the Triton kernel, which sums tiles in fp16)
become infinite. `ANYATTN_CHECKS=1` checks for them (`value_max`).
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import bound
from anyattn.adapters.sage import packed, tiles
from anyattn.adapters.sage.declarations import FP8, FP16, PACKED, PICKS, TRITON
from anyattn.adapters.sage.kernels import REACH, SAGEATTENTION, bound_dense, call_dense, that_knows_its_parameters
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.from_hub import FromHub
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Runner
from anyattn.environment import Environment
from anyattn.sources.hub import DIFFUSERS, HubKernel
from anyattn.sources.packages import Package, functions_of
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

_WAITS = Conversion("synchronises", f"{packed.ENTRY} waits for the device, and can't be captured in a CUDA graph")


class _Sage(Backend):
    """One function of SageAttention.

    Attributes:
        function: Its name.
        flag: The name in `sageattention.core` of whether its extension could be imported; empty if it needs none.
        packs: Whether `sageattn_varlen` runs packed sequences and key masks; otherwise they are refused.
    """

    family = "sage"
    packages: ClassVar[tuple[Package, ...]] = (SAGEATTENTION,)
    function: ClassVar[str]
    flag: ClassVar[str] = ""
    packs: ClassVar[bool] = False

    def goes_packed(self, spec: AttentionSpec) -> bool:
        """Whether a call uses `sageattn_varlen`. Law: pure."""
        return self.packs and (spec.packed or spec.mask.key is not None)

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = super().capabilities(spec, env)
        return PACKED if caps is not None and self.goes_packed(spec) else caps

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        dim = 64 if spec.head_dim <= 64 else 128
        size = spec.batch * dim * max(spec.seqlen_q * spec.num_heads, spec.seqlen_kv * spec.num_kv_heads)
        if size >= REACH:
            need = f"fewer than {REACH} elements, head_dim padded to {dim}"
            yield Reason("size", need, str(size), "split the batch")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        caps = self.capabilities(spec, env)
        assert caps is not None
        if not self.goes_packed(spec):
            return _in_whole_tiles(_flash.lower(self.entry(spec, env), caps, spec, head_dim_multiple=1), spec)
        lowering = _flash.lower(packed.ENTRY, caps, spec, packs=True, head_dim_multiple=1)
        return dataclasses.replace(lowering, conversions=(*lowering.conversions, _WAITS))

    def entry(self, spec: AttentionSpec, env: Environment) -> str:
        """Return the kernel of a call that isn't packed. Law: pure."""
        return self.function

    def prepare(self, functions: Any) -> Any:
        found = functions_of(functions.module, (self.function,), SAGEATTENTION.module)
        function = that_knows_its_parameters(getattr(found, self.function), self.function)
        if self.flag and not getattr(importlib.import_module("sageattention.core"), self.flag):
            # The package hides the error of the extension's import, and asserts at the call.
            arch = self.flag.removesuffix("_ENABLED").lower()
            raise ImportError(f"This sageattention was built without its kernels for {arch}, or they can't be loaded")
        made = types.SimpleNamespace(attend=function)
        if self.packs:
            made.varlen = packed.entry_of(found.module)
        return made

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        call = packed.call_packed if plan.lowering.entry == packed.ENTRY else call_dense
        return _flash.attend(plan, query, key, value, parts, call)

    def length_period(self, spec: AttentionSpec) -> int:
        return tiles.ROWS

    def bind(self, plan: Plan) -> Runner | None:
        if (
            self.goes_packed(plan.spec)
            or plan.spec.return_lse
            or _in_whole_tiles(plan.lowering, plan.spec) is not plan.lowering
        ):
            return None
        return bound.bind(plan, bound_dense(plan))

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        return bound.without_mask(self.bind(plan))


def _in_whole_tiles(lowering: Lowering, spec: AttentionSpec) -> Lowering:
    """Add to the lowering what is done for lengths at which a kernel reads uninitialised memory."""
    pattern = lowering.pattern
    rows, keys = spec.seqlen_q, spec.seqlen_kv
    if pattern is not None and pattern.rows is not None:
        rows = pattern.rows[1] - pattern.rows[0]
    if pattern is not None:
        keys = _flash.keys_left(spec, pattern)
    causal = pattern is not None and (pattern.left, pattern.right) == (-1, 0)
    note = tiles.note(lowering.entry, rows, keys, causal=causal)
    return lowering if note is None else dataclasses.replace(lowering, conversions=(*lowering.conversions, note))


_PICK = FP8.replace(arch_min=(8, 0), arch_max=(12, 1))


class Sage(_Sage):
    """SageAttention's own pick by the GPU's compute capability; for packed calls and key masks, `sageattn_varlen`."""

    name = "sage"
    aliases = ("sage_attn", "sage_varlen")
    function = "sageattn"
    packs = True
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _PICK.replace(key_mask=True, varlen=True)}

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        picked = None if self.goes_packed(spec) else _pick(spec, env)
        return super().capabilities(spec, env) if picked is None else picked[1]

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        yield from super().rejects(spec, env)
        if self.goes_packed(spec):
            return  # sageattn_varlen is one kernel on every GPU
        device = env.device(spec.device_type, spec.device_index)
        if device is None or device.arch is None or not (8, 0) <= device.arch <= (12, 1):
            return  # refused by the declaration
        version = env.version("sageattention")
        name = f"sm{device.arch[0]}{device.arch[1]}"
        if device.arch not in PICKS:
            archs = ", ".join(f"sm{major}{minor}" for major, minor in PICKS)
            yield Reason("arch", archs, f"{name} ({device.name})", "name one of its kernels")
        elif device.arch == (12, 1) and version is not None and version.release < (2, 2):
            yield Reason("arch", "sageattention >= 2.2 on sm121", str(version), "name one of its kernels")

    def entry(self, spec: AttentionSpec, env: Environment) -> str:
        picked = _pick(spec, env)
        return self.function if picked is None else f"{self.function} ({picked[0]})"


def _pick(spec: AttentionSpec, env: Environment) -> tuple[str, Capabilities] | None:
    device = env.device(spec.device_type, spec.device_index)
    return None if device is None or device.arch is None else PICKS.get(device.arch)


class SageInt8Fp16(_Sage):
    """Scores in int8, values in fp16, summed in fp32."""

    name = "sage_int8_fp16"
    aliases = ("_sage_qk_int8_pv_fp16_cuda",)
    function = "sageattn_qk_int8_pv_fp16_cuda"
    flag = "SM80_ENABLED"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": FP16}


class SageInt8Fp16Triton(_Sage):
    """Scores in int8, values in fp16, in Triton; causal needs as many queries as keys, without fully masked ones."""

    name = "sage_int8_fp16_triton"
    aliases = ("_sage_qk_int8_pv_fp16_triton",)
    function = "sageattn_qk_int8_pv_fp16_triton"
    packs = True
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": TRITON.replace(key_mask=True, varlen=True)}


class SageInt8Fp8(_Sage):
    """Scores in int8, weights and values in fp8."""

    name = "sage_int8_fp8"
    aliases = ("_sage_qk_int8_pv_fp8_cuda",)
    function = "sageattn_qk_int8_pv_fp8_cuda"
    flag = "SM89_ENABLED"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": FP8}


class SageInt8Fp8Sm90(_Sage):
    """Scores in int8, weights and values in fp8, for Hopper."""

    name = "sage_int8_fp8_sm90"
    aliases = ("_sage_qk_int8_pv_fp8_cuda_sm90",)
    function = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    flag = "SM90_ENABLED"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": FP8.replace(arch_min=(9, 0), arch_max=(9, 0))}


class SageHub(FromHub, Sage):
    """SageAttention's own pick from the Hub, without packed sequences."""

    name = "sage_hub"
    # `sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs)`: other
    # keywords are ignored, including attn_mask, scale and dropout_p. It has no kernel for sm100, no varlen entry and no
    # backward: its output is detached. It raises RuntimeError if the build lacks the GPU's kernel. Causal is upper
    # left.
    hub = HubKernel(
        "SageAttention/sage-attention",
        ("sageattn",),
        version=3,
        source=DIFFUSERS,
        note="only sageattn: the single kernels of SageAttention aren't exported",
    )
    packs = False
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _PICK}
