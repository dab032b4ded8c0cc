"""AITER, AMD's attention for ROCm: the distribution amd-aiter (PyPI's `aiter` is another package).

Sources: `aiter/ops/mha.py` of amd-aiter 0.1.7 and of ROCm/aiter e4048607. No AMD GPU has run this adapter: a contract
double stands in for the kernel. Causal and windows are aligned to the lower right.

What needs care: on its fast paths a window whose sides are both <= 0 counts as none, so causal is passed by the flag
only and such windows are refused. A call that needs gradients must request lse, or an assertion fails. The backward of
causal attention with unequal lengths is aligned differently from its forward. `return_attn_probs` returns other things
in lse's place. Softcap and sinks aren't declared: only the packed entry has softcap, without a backward, and sinks have
no gradient.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import KernelCall
from anyattn.backend.capabilities import Capabilities, kernel_pattern
from anyattn.backend.from_hub import FromHub
from anyattn.backend.patterns import KernelPattern, trimmed
from anyattn.backend.protocol import Backend, Lowering, Output, Parts, Plan
from anyattn.environment import Environment
from anyattn.lowering import packed_rows
from anyattn.sources.hub import DIFFUSERS, HubKernel
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import UNKNOWN, AttentionSpec

_MODULE = "aiter.ops.mha"

AMD_AITER = Package(
    "amd-aiter", _MODULE, _flash.FUNCTIONS, ">=0.1.5", others=("aiter",), note="PyPI's aiter is another package"
)
AITER = Package("aiter", _MODULE, _flash.FUNCTIONS, ">=0.1.5", AMD_AITER.command)
"""The name of AMD's own wheels up to 0.1.7, and of PyPI's package, which lacks the module."""

UNNAMED = Package("", _MODULE, _flash.FUNCTIONS, install=AMD_AITER.command, found_by=_MODULE)
"""A build without metadata."""

_ROCM = _flash.DECLARED.replace(rocm=True, head_dim_v=True, window_any_right=True, dropout=True)


def package_on(env: Environment) -> Package:
    """Return the package that contains the kernel on a machine, or the one to install."""
    if "amd-aiter" in env.packages:
        return AMD_AITER
    if _MODULE in env.modules:
        return AITER if "aiter" in env.packages else UNNAMED
    return AMD_AITER


class Aiter(Backend):
    """AITER, dense and varlen."""

    name = "aiter"
    family = "aiter"
    aliases = ("aiter_fa2",)
    auto_rank = 60
    packages: ClassVar[tuple[Package, ...]] = (AMD_AITER,)
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _ROCM}

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from self.no_device(env)
        yield from _not_nvidia(env, self.declarations)
        package = package_on(env)
        if package is AMD_AITER and "amd-aiter" not in env.packages and "aiter" in env.packages:
            got = f"aiter {env.packages['aiter']}, another package of the same name"
            yield Reason("not_installed", AMD_AITER.wanted, got, f"pip uninstall aiter; {self.install}")
        else:
            yield from package.reasons(env)

    def package(self, env: Environment) -> Package | None:
        package = package_on(env)
        return None if any(package.reasons(env)) else package

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        pattern = self._pattern(spec)
        if pattern is None:
            return
        rows, keys = _left_over(pattern, spec)
        sides = f"({pattern.left}, {pattern.right}) on {rows} queries and {keys} keys"
        left, right = _sides(pattern.left, pattern.right, keys)
        if right > 0 and keys <= right < rows - 1:
            need = "a right side below seqlen_kv if seqlen_q > seqlen_kv (the kernel treats others as unbounded)"
            yield Reason("mask", need, sides, "flex takes every mask")
        if left == 0 and not 0 < right < keys:
            need = "a window with a side above 0 (the kernel treats others as no window)"
            yield Reason("mask", need, sides, "flex takes every mask")
        unequal = not spec.same_lengths and (rows != keys or rows == UNKNOWN)
        if spec.packed and not spec.same_lengths and (left, right) != (-1, 0):
            yield Reason("mask", "no window over packed sequences of different lengths", sides, "flash4 takes them")
        if (left, right) == (-1, 0) and spec.needs_grad and (unequal or (spec.packed and not spec.same_lengths)):
            need = "equal lengths for gradients of causal attention (its backward is aligned differently)"
            yield Reason("mask", need, sides, "flex takes every mask")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        dense = spec.mask.key is None and not spec.packed
        entry = "flash_attn_func" if dense else "flash_attn_varlen_func"
        lowering = _flash.lower(entry, self.declarations[spec.device_type], spec, packs=True)
        pattern, notes = self._pattern(spec), lowering.conversions
        if pattern is not None and pattern != lowering.pattern:
            notes = (*notes, Conversion("trimmed", f"rows {pattern.rows} only: the others see no key"))
        return dataclasses.replace(lowering, pattern=pattern, conversions=notes)

    def _pattern(self, spec: AttentionSpec) -> KernelPattern | None:
        pattern = kernel_pattern(self.declarations[spec.device_type], spec)
        if pattern is None or spec.packed:
            return pattern
        return trimmed(pattern, spec.seqlen_q, spec.seqlen_kv)

    def prepare(self, functions: Any) -> Any:
        default = inspect.signature(functions.flash_attn_func).parameters["window_size"].default
        # (left, right) up to 0.1.7, (left, right, sink size) since.
        functions.window_rest = (0,) if isinstance(default, tuple) and len(default) == 3 else ()
        return functions

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, _call)


class AiterHub(FromHub, Aiter):
    """AITER's composable-kernel attention from the Hub: forward only, bf16, head_dim 64 or 128."""

    name = "aiter_hub"
    aliases = ("aiter_fa2_hub",)
    # ROCm, gfx942 and gfx950. Differences from amd-aiter: there is no autograd, and outputs are detached; float16
    # raises "invalid argument for fmha_fwd"; head_dim is 64 or 128; unknown keywords, including softcap and
    # deterministic, are ignored; sinks are `s_aux`, not `sink_ptr`; windows have three parts. `return_lse=True` returns
    # lse; with only `return_attn_probs=True` the second part of the tuple is the dropout mask (`mha.py`).
    hub = HubKernel(
        "kernels-community/aiter-flash-attn-ck",
        _flash.FUNCTIONS,
        version=1,
        source=DIFFUSERS,
        note="forward only, bfloat16 only, head_dim 64 or 128",
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {
        "cuda": _ROCM.replace(
            dtypes=frozenset((torch.bfloat16,)),
            head_dim_max=128,
            head_dim_multiple=64,
            head_dim_v=False,
            # Its functions ignore unknown keywords, and none of its sources mentions dropout.
            dropout=False,
            backward=False,
            deterministic=False,
        )
    }

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from super().availability(env)
        yield from _not_nvidia(env, self.declarations)

    def prepare(self, functions: Any) -> Any:
        functions.window_rest = (0,)
        return functions


def _not_nvidia(env: Environment, kinds: Iterable[str]) -> Iterator[Reason]:
    devices = [device for device in env.devices if device.type in kinds]
    # Only NVIDIA's GPUs have a compute capability.
    if devices and all(device.arch is not None and not device.rocm for device in devices):
        names = ", ".join(dict.fromkeys(device.name for device in devices))
        yield Reason("arch", "an AMD GPU (ROCm)", f"NVIDIA ({names})", "choose flash2 on NVIDIA")


def _left_over(pattern: KernelPattern, spec: AttentionSpec) -> tuple[int, int]:
    rows = spec.seqlen_q if pattern.rows is None else pattern.rows[1] - pattern.rows[0]
    keys = spec.seqlen_kv if pattern.keys is None else pattern.keys[1] - pattern.keys[0]
    return rows, keys


def _sides(left: int, right: int, keys: int) -> tuple[int, int]:
    """Make a left side unbounded if the last row sees the first key; a pattern that is causal then is passed as such.

    The kernel itself does so from S_kv on, but then doesn't notice that the pattern is causal.
    """
    return (-1 if 0 < keys <= left + 1 else left), right


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    spec, functions = plan.spec, FUNCTIONS[plan.backend]
    left, right = _sides(call.left, call.right, call.max_seqlen_kv)
    causal = left == -1 and right == 0
    # It asserts that lse is requested if any input needs a gradient.
    with_lse = spec.return_lse or plan.rescale or spec.needs_grad
    options: dict[str, Any] = {
        "dropout_p": spec.dropout_p,
        "softmax_scale": spec.scale,
        "causal": causal,
        "window_size": (-1, -1, *functions.window_rest) if causal else (left, right, *functions.window_rest),
        "deterministic": spec.deterministic,
        "return_lse": with_lse,
    }
    if call.cu_seqlens_kv is None:
        result = functions.flash_attn_func(call.query, call.key, call.value, **options)
        return (result[0], result[1]) if with_lse else (result, None)
    # What it writes for an entry without keys is unknown, in its backward too, so those rows are replaced.
    assert call.cu_seqlens_q is not None
    alive = packed_rows.used(call.cu_seqlens_q, call.cu_seqlens_kv, call.query.shape[0])
    result = functions.flash_attn_varlen_func(
        torch.where(alive[:, None, None], call.query, 0),
        call.key,
        call.value,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_kv,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_kv,
        **options,
    )
    out, lse = (result[0], result[1]) if with_lse else (result, None)
    return torch.where(alive[:, None, None], out, 0), None if lse is None else lse.masked_fill(~alive, float("-inf"))
