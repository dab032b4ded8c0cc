"""torch's flash kernel if another one replaces it in the whole process.

Sources: torch 2.13 `torch/nn/attention/_fa3.py`, `_fa4.py`; cudnn-frontend 1.32 `cudnn/torch` (by reading). A call that
the replacement refuses is an error: SDPA doesn't fall back to another kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from anyattn.environment import Environment
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_RESTORE = "torch.nn.attention.restore_flash_attention_impl(), or choose another backend"
_MAJORS: Mapping[str, tuple[int, ...]] = {"FA3": (9,), "FA4": (9, 10)}
_ALL = ("native_flash", "native_cudnn", "varlen_attn")


def origin(env: Environment, kernels: tuple[str, ...] = _ALL) -> str:
    """Return which of torch's kernels are replaced, and by what; empty if none is. Law: pure."""
    found = (f"{by} in place of torch's own {kernel}" for kernel in kernels if (by := env.overrides.get(kernel)))
    return "; ".join(found)


def flash_reasons(spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
    """Yield why a replacement of the flash kernel would refuse a call, or compute it wrong. Law: pure."""
    by = env.overrides.get("native_flash")
    if by is None or spec.device_type != "cuda":
        return
    majors = _MAJORS.get(by)
    if majors is None:
        yield Reason("setting", "torch's own flash kernel, FA3 or FA4", by, _RESTORE)
        return
    device = env.device(spec.device_type, spec.device_index)
    arch = None if device is None else device.arch
    if arch is not None and arch[0] not in majors:
        need = f"{' or '.join(f'sm{major}0' for major in majors)} for {by}, which replaces the flash kernel"
        yield Reason("arch", need, f"sm{arch[0]}{arch[1]}", _RESTORE)
    if spec.dropout_p:
        need = f"dropout_p == 0 with {by}, which replaces the flash kernel"
        yield Reason("dropout", need, str(spec.dropout_p), _RESTORE)
    if by == "FA3" and spec.needs_grad and env.left_out("flash_attn_config", "BACKWARD"):
        yield Reason("backward", "a build of FlashAttention-3 with a backward", "one without", _RESTORE)
    if by == "FA3" and spec.dtype == torch.float16 and env.left_out("flash_attn_config", "FP16"):
        yield Reason("dtype", "a build of FlashAttention-3 with fp16", "one without", _RESTORE)
    if by == "FA4":
        yield from _fa4_head_dims(spec, arch)


def _fa4_head_dims(spec: AttentionSpec, arch: tuple[int, int] | None) -> Iterator[Reason]:
    if arch is not None and arch[0] == 10 and spec.head_dim > 128:
        yield Reason("head_dim", "head_dim <= 128 with FA4 on sm100", str(spec.head_dim), _RESTORE)
    if (arch is None or arch[0] == 9) and spec.needs_grad and spec.head_dim % 32:
        # See `flash4-backward-head-dims` in the known-bad table.
        need = "head_dim a multiple of 32 for gradients with FA4 on sm90"
        yield Reason("head_dim", need, str(spec.head_dim), _RESTORE)


def takes_packed(spec: AttentionSpec, env: Environment) -> bool:
    """Whether torch's packed entry, or its replacement, is right for a packed call. Law: pure.

    cudnn-frontend's aligns causal to the upper left, unlike torch's own: it is right only if S_q == S_kv.
    """
    if "varlen_attn" in env.overrides and spec.mask.pattern is not None and not spec.same_lengths:
        return False
    return not any(flash_reasons(spec, env))
