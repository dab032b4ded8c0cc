"""FlashAttention-2: the package flash-attn, or the same functions from the Hub.

Sources: `flash_attn/flash_attn_interface.py` and `csrc/flash_attn/flash_api.cpp` of flash-attention 2.6.3 to 2.8.4; a
build of 2.8.3.post2 on an H100. Causal and windows are aligned to the lower right; a row without a key has lse +inf.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from packaging.version import Version
from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import KernelCall, bound
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.from_hub import FromHub
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Runner
from anyattn.environment import Environment
from anyattn.sources.hub import HubKernel
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_CUDA = _flash.DECLARED.replace(arch_min=(8, 0), dropout=True, softcap=True, compile=True, cuda_graph=True)


class Flash2(Backend):
    """FlashAttention-2, dense and varlen."""

    name = "flash2"
    family = "flash2"
    aliases: ClassVar[tuple[str, ...]] = ("flash", "flash_attn", "flash_varlen", "flash_attn_2")
    auto_rank = 40
    packages: ClassVar[tuple[Package, ...]] = (
        Package(
            "flash-attn",
            "flash_attn",
            _flash.FUNCTIONS,
            ">=2.6.3,<3",
            "pip install {requirement} --no-build-isolation",
            note="flash-attn-4 has a namespace flash_attn too, without these functions",
        ),
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _CUDA}

    def kernel_version(self, env: Environment) -> Version | None:
        """Return the version of the functions that are called; None if they are new enough."""
        return env.version("flash-attn")

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.scale <= 0:
            return  # refused by the declaration
        if spec.softcap is not None and spec.dropout_p:
            yield Reason("softcap", "softcap without dropout", f"dropout_p {spec.dropout_p}")
        version = self.kernel_version(env)
        if version is not None and version.release < (2, 7):
            if spec.compiled:
                yield Reason("wrong_version", "flash-attn >= 2.7 under torch.compile", str(version), "upgrade it")
            device = env.device(spec.device_type, spec.device_index)
            if device is not None and device.arch is not None and device.arch[0] > 9:
                yield Reason("arch", "sm80 to sm90 with flash-attn below 2.7", f"sm{device.arch[0]}{device.arch[1]}")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        entry = "flash_attn_func" if spec.mask.key is None and not spec.packed else "flash_attn_varlen_func"
        return _flash.lower(entry, self.declarations[spec.device_type], spec, packs=True)

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, _call)

    def length_period(self, spec: AttentionSpec) -> int:
        return 1

    def bind(self, plan: Plan) -> Runner | None:
        pattern = plan.lowering.pattern
        sides = (-1, -1) if pattern is None else (pattern.left, pattern.right)
        return bound.bind(plan, functools.partial(FUNCTIONS[plan.backend].flash_attn_func, **_options(plan, *sides)))

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        return bound.without_mask(self.bind(plan))


class Flash2Hub(FromHub, Flash2):
    """The same from the Hub, whose builds follow flash-attn 2.8; those for CPUs ignore arguments and aren't used."""

    name = "flash2_hub"
    aliases = ("flash_hub", "flash_varlen_hub", "flash_attn_2_hub")
    # Signatures and conventions are those of flash-attn 2.8. Builds are for CUDA, ROCm, XPU and CPUs: only CUDA's are
    # declared, since `flash_attn_cpu/flash_api.cpp` ignores dropout, softcap and seqused_k, and leaves lse undefined.
    # Builds of this line for CUDA 12.8 were known to raise in a backward with fewer key/value heads (kernels-community
    # issue 1085); nobody reported that the pinned one doesn't.
    hub = HubKernel(
        "kernels-community/flash-attn2",
        _flash.FUNCTIONS,
        revision="81fb77c12b2ad5d69380669b46739d5868614502",
        source="a build against torch's stable ABI; the public projects msm_repro (torch 2.14, CUDA 13.0, an H100, "
        "trains with fewer key/value heads) and laya_blackwell record that they run it",
        note="there are builds for CPUs, which accept dropout and softcap and ignore them",
    )

    def kernel_version(self, env: Environment) -> Version | None:
        return None  # the installed package isn't what is called

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        yield from super().rejects(spec, env)
        if spec.num_kv_heads != spec.num_heads and spec.requires_grad and env.torch.local == "cu128":
            link = "https://github.com/huggingface/kernels-community/issues/1085"
            hint = "use flash2, or a torch for another CUDA"
            yield Reason("backward", "a CUDA other than 12.8 for gradients with GQA", f"torch {env.torch}", hint, link)


def _options(plan: Plan, left: int, right: int) -> dict[str, Any]:
    """Return the arguments of a dense or packed call besides tensors and lengths."""
    spec = plan.spec
    return {
        "dropout_p": spec.dropout_p,
        "softmax_scale": spec.scale,
        "causal": left == -1 and right == 0,
        "window_size": (left, right),
        "softcap": 0.0 if spec.softcap is None else spec.softcap,
        "deterministic": spec.deterministic,
        "return_attn_probs": spec.return_lse or plan.rescale,
    }


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    functions = FUNCTIONS[plan.backend]
    options = _options(plan, call.left, call.right)
    with_lse = options["return_attn_probs"]
    if call.cu_seqlens_kv is None:
        result = functions.flash_attn_func(call.query, call.key, call.value, **options)
    else:
        result = functions.flash_attn_varlen_func(
            call.query,
            call.key,
            call.value,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_kv,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_kv,
            **options,
        )
    return (result[0], result[1]) if with_lse else (result, None)
