"""SageAttention 2: its own pick, and four of its kernels by name; the package sageattention, from its sources.

Sources: `sageattention/core.py`, `sageattention/triton/` and `csrc/` of SageAttention 2.1.1 to 2.2.0; a build of 2.2.0
on an H100. Query and key are quantised to int8, and weights and value to fp16 or fp8, so that a result is off by some
3e-2 of its size (the 2-norm; 2e-3 is what a bf16 kernel is off by). Forward alone: the output carries no gradient,
without a word. Causal is aligned to the upper left; lse is natural, float32 and `(B, H, S_q)`.

Every function swallows the keywords that it doesn't know: `load` looks for those that are used here. No masks: the
Triton kernel's `attn_mask` adds biases to scores to base 2, and gives rows without a key what their tile gives. The
function for packed sequences, `sageattn_varlen`, isn't used: it has no lse and waits for the device. Under
torch.compile calls are refused: whether a build can be traced can't be told from its version.

The fp16 kernels cast value, and bf16 values above 65504 (from 1024 on in the Triton kernel, whose tiles sum up in fp16)
become infinite. That can't be told from a call's shapes: `ANYATTN_CHECKS=1` looks for it (`value_max`).
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyattn import flash_like, hub_kernels
from anyattn.backend import Backend, Lowering, Output, Parts, Plan
from anyattn.capabilities import Capabilities
from anyattn.environment import Arch, Environment
from anyattn.flash_like import KernelCall
from anyattn.hub import FromHub
from anyattn.kernel_source import FUNCTIONS, Package
from anyattn.reasons import Reason
from anyattn.spec import AttentionSpec

PARAMETERS = ("tensor_layout", "is_causal", "sm_scale", "return_lse")
"""The keywords that are passed; nothing is left to `**kwargs`."""

# PyPI's 1.0.6 gives no lse, and writes to the caller's key.
_INSTALL = "build github.com/thu-ml/SageAttention"
_NOTE = "PyPI has 1.0.6"

_REACH = 1 << 31
"""The elements that 32-bit offsets reach (`triton/quant_per_thread.py`: a block's index times a stride)."""

_FP8 = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16)),
    arch_min=(8, 9),
    head_dim_max=128,
    causal=frozenset(("upper_left",)),
    realigns=True,
    # Rows without a key come of patterns alone, and are left out before the call.
    dead_rows=True,
    gqa=True,
    lse=True,
    quantised="fp8",
    # What isn't contiguous along head_dim, or aligned, is copied.
    unit_stride=False,
    # Launch grids hold heads and batch in their y and z (qk_int_sv_f8_cuda_sm90.cu).
    batch_max=65535,
    # The functions call torch.cuda.set_device themselves, and leave it at that.
    device_guard=True,
)
# Value is cast to fp16, whose largest number this is: greater bf16 values become infinite.
_FP16 = _FP8.replace(arch_min=(8, 0), quantised="int8", value_max=65504.0)
_TRITON = _FP16.replace(
    # `core.py`: the Triton kernel isn't usable on sm120.
    arch_max=(10, 3),
    # An assertion, which python -O leaves out (attn_qk_int8_per_block_causal.py).
    causal=frozenset(("upper_left", "lower_right")),
    causal_square=True,
    # Sums over a tile of 64 keys are in fp16.
    value_max=65504.0 / 64,
)

_PICKS: Mapping[Arch, tuple[str, Capabilities]] = {
    (8, 0): ("sageattn_qk_int8_pv_fp16_cuda", _FP16),
    (8, 6): ("sageattn_qk_int8_pv_fp16_triton", _TRITON),
    (8, 9): ("sageattn_qk_int8_pv_fp8_cuda", _FP8),
    (9, 0): ("sageattn_qk_int8_pv_fp8_cuda_sm90", _FP8),
    (12, 0): ("sageattn_qk_int8_pv_fp8_cuda", _FP8),
    (12, 1): ("sageattn_qk_int8_pv_fp8_cuda", _FP8),
}
"""Which kernel `sageattn` takes, and what that one accepts."""


class _Sage(Backend):
    """One function of SageAttention.

    Attributes:
        function: Its name.
        flag: The name in `sageattention.core` that says whether its extension could be imported; empty asks for none.
    """

    family = "sage"
    function: ClassVar[str]
    flag: ClassVar[str] = ""

    @property
    def package(self) -> Package:
        """The distribution."""
        return Package(
            "sageattention", "sageattention", (self.function,), ">=2.1.1,<3", _INSTALL, "sageattention", _NOTE
        )

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from super().availability(env)
        for reason in self.package.reasons(env):
            yield Reason(reason.code, reason.need, reason.got, f"{_INSTALL}; {_NOTE}")

    def origin(self, env: Environment) -> str:
        return "" if any(self.package.reasons(env)) else f"sageattention {env.packages['sageattention']}"

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        dim = 64 if spec.head_dim <= 64 else 128
        size = spec.batch * dim * max(spec.seqlen_q * spec.num_heads, spec.seqlen_kv * spec.num_kv_heads)
        if size >= _REACH:
            need = f"fewer than {_REACH} elements, head_dim padded to {dim}"
            yield Reason("size", need, str(size), "split the batch")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        caps = self.capabilities(spec, env)
        assert caps is not None
        return flash_like.lower(self.entry(spec, env), caps, spec, head_dim_multiple=1)

    def entry(self, spec: AttentionSpec, env: Environment) -> str:
        """Say which kernel it will be. Law: pure."""
        return self.function

    def load(self) -> None:
        function = _that_knows_its_parameters(getattr(self.package.load(), self.function), self.function)
        if self.flag and not getattr(importlib.import_module("sageattention.core"), self.flag):
            # The package hides what the extension's import raised, and asserts at the call.
            arch = self.flag.removesuffix("_ENABLED").lower()
            raise ImportError(f"This sageattention was built without its kernels for {arch}, or they can't be loaded")
        FUNCTIONS[self.name] = types.SimpleNamespace(attend=function)

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return flash_like.attend(plan, query, key, value, parts, _call)


def _that_knows_its_parameters(function: Any, name: str) -> Any:
    known = inspect.signature(function).parameters
    missing = [parameter for parameter in PARAMETERS if parameter not in known]
    if missing:
        text = f"{name} has no parameter {' and '.join(missing)}, and would swallow it. {_INSTALL}; {_NOTE}"
        raise ImportError(text)
    return function


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    with_lse = plan.spec.return_lse or plan.rescale
    result: Any = FUNCTIONS[plan.backend].attend(
        _readable(call.query),
        _readable(call.key),
        _readable(call.value),
        tensor_layout="NHD",
        is_causal=call.left == -1 and call.right == 0,
        sm_scale=plan.spec.scale,
        return_lse=with_lse,
    )
    if isinstance(result, tuple) != with_lse:
        raise TypeError(f"{plan.lowering.entry} gave a {type(result).__name__} for return_lse={with_lse}")
    if not with_lse:
        return result, None
    out, lse = result
    batch, seqlen_q, heads = call.query.shape[:3]
    if lse.shape != (batch, heads, seqlen_q):
        raise RuntimeError(f"{plan.lowering.entry} gave an lse of {tuple(lse.shape)}, not (B, H, S_q)")
    return out, lse


def _readable(tensor: Tensor) -> Tensor:
    """Copy what the kernels' offsets don't reach, and on a CPU (where copies aren't planned) what has strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if last < _REACH and tensor.stride(-1) == 1 else tensor.contiguous()


class Sage(_Sage):
    """What SageAttention itself picks for the GPU: by its compute capability alone."""

    name = "sage"
    function = "sageattn"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _FP8.replace(arch_min=(8, 0), arch_max=(12, 1))}

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        picked = _pick(spec, env)
        return super().capabilities(spec, env) if picked is None else picked[1]

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        yield from super().rejects(spec, env)
        device = env.device(spec.device_type, spec.device_index)
        if device is None or device.arch is None or not (8, 0) <= device.arch <= (12, 1):
            return  # the declaration says what there is to say
        version = env.version("sageattention")
        name = f"sm{device.arch[0]}{device.arch[1]}"
        if device.arch not in _PICKS:
            archs = ", ".join(f"sm{major}{minor}" for major, minor in _PICKS)
            yield Reason("arch", archs, f"{name} ({device.name})", "name one of its kernels")
        elif device.arch == (12, 1) and version is not None and version.release < (2, 2):
            yield Reason("arch", "sageattention >= 2.2 on sm121", str(version), "name one of its kernels")

    def entry(self, spec: AttentionSpec, env: Environment) -> str:
        picked = _pick(spec, env)
        return self.function if picked is None else f"{self.function} ({picked[0]})"


def _pick(spec: AttentionSpec, env: Environment) -> tuple[str, Capabilities] | None:
    device = env.device(spec.device_type, spec.device_index)
    return None if device is None or device.arch is None else _PICKS.get(device.arch)


class SageInt8Fp16(_Sage):
    """Scores in int8, values in fp16, summed in fp32."""

    name = "sage_int8_fp16"
    function = "sageattn_qk_int8_pv_fp16_cuda"
    flag = "SM80_ENABLED"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _FP16}


class SageInt8Fp16Triton(_Sage):
    """Scores in int8, values in fp16, in Triton; causal needs as many queries as keys, once idle ones are left out."""

    name = "sage_int8_fp16_triton"
    function = "sageattn_qk_int8_pv_fp16_triton"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _TRITON}


class SageInt8Fp8(_Sage):
    """Scores in int8, weights and values in fp8."""

    name = "sage_int8_fp8"
    function = "sageattn_qk_int8_pv_fp8_cuda"
    flag = "SM89_ENABLED"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _FP8}


class SageInt8Fp8Sm90(_Sage):
    """Scores in int8, weights and values in fp8, for Hopper."""

    name = "sage_int8_fp8_sm90"
    function = "sageattn_qk_int8_pv_fp8_cuda_sm90"
    flag = "SM90_ENABLED"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _FP8.replace(arch_min=(9, 0), arch_max=(9, 0))}


class SageHub(FromHub, Sage):
    """SageAttention's own pick from the Hub."""

    name = "sage_hub"
    hub = hub_kernels.SAGE

    def load(self) -> None:
        super().load()
        function = _that_knows_its_parameters(FUNCTIONS[self.name].sageattn, "sageattn")
        FUNCTIONS[self.name] = types.SimpleNamespace(attend=function)
