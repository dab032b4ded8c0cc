"""Packed sequences on torch's own flash kernel: `torch.nn.attention.varlen.varlen_attn`, since torch 2.11.

Source: torch 2.13, `torch/nn/attention/varlen.py`; an H100 with torch 2.11, the oldest that was seen to take these
parameters. For CUDA, in half precision. It aligns causal attention, said as the window (-1, 0), to the lower right, and
gives lse as `(H, T_q)`, with +inf in rows without a key. There is no dropout; shared heads take a parameter that isn't
used here, and so are repeated. Nothing is read on the host. What it writes for sequences without keys, and whether
anything, depends on the kernel behind it (cuDNN from torch 2.14 on): `packed_rows` fills those rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from anyattn.adapters.native import replaced
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Lowering, Output, Parts, Plan
from anyattn.environment import Environment
from anyattn.lowering.storage import realigned
from anyattn.process.installed import varlen_is_replaced
from anyattn.types.reasons import Conversion
from anyattn.types.spec import UNKNOWN, AttentionSpec

ENTRY = "varlen_attn"

_SINCE = Version("2.11")
_MAY_BE_CUDNN = Version("2.14")
CUDNN = "torch >= 2.14 hands it to cuDNN"


def takes(spec: AttentionSpec, env: Environment) -> bool:
    """Whether torch's own entry takes a packed call as it is; otherwise the call is padded. Law: pure."""
    pattern = spec.mask.pattern
    if pattern is not None and not (pattern.is_causal and (spec.same_lengths or pattern.align == "lower_right")):
        return False
    device = env.device(spec.device_type, spec.device_index)
    if spec.forward_ad or spec.vmap or not spec.packed or device is None or device.arch is None or device.rocm:
        return False
    if not (8, 0) <= device.arch <= (12, 1):
        return False
    # Chips with less shared memory than an A100 have no gradients for wide heads (torch's sdp_utils.cpp).
    most = 192 if spec.needs_grad and device.arch not in ((8, 0), (9, 0), (10, 0)) else 256
    wide = spec.head_dim != spec.head_dim_v or spec.head_dim > most
    plain = spec.scale > 0 and not spec.dropout_p and spec.softcap is None and not (spec.deterministic or wide)
    if not (plain and spec.dtype.itemsize == 2 and env.torch >= _SINCE):
        return False
    # cuDNN's own limits (torch asks for none but a multiple of 8) are those of native_cudnn.
    return replaced.takes_packed(spec, env) and not (may_be_cudnn(spec, env) and spec.head_dim > 128)


def may_be_cudnn(spec: AttentionSpec, env: Environment) -> bool:
    """Whether torch hands a packed call to cuDNN in place of flash (torch 2.14.1, `varlen.py`, by reading). Law: pure.

    The lengths on the host decide, so that a length which isn't known yet may be either.
    """
    device = env.device(spec.device_type, spec.device_index)
    if not spec.packed or device is None or device.arch is None or device.rocm or device.arch[0] not in (9, 10):
        return False
    new = env.torch >= _MAY_BE_CUDNN and env.cudnn is not None and env.cudnn >= (9, 18, 0)
    return new and spec.mask.pattern is None and (spec.seqlen_q == UNKNOWN or spec.seqlen_q > 128)


def declared(caps: Capabilities) -> Capabilities:
    """Give a kernel's declaration for the calls that `takes` takes."""
    return caps.replace(varlen=True, causal=frozenset(("lower_right",)), causal_square=False, dead_rows=True)


def kernel_of(spec: AttentionSpec, env: Environment) -> str:
    """Say which kernel torch's entry hands a packed call to. Law: pure."""
    if may_be_cudnn(spec, env):
        return "on cuDNN, or on flash for 128 queries at most" if spec.seqlen_q == UNKNOWN else "on cuDNN"
    by = replaced.origin(env, ("native_flash", "varlen_attn"))
    return f"with {by}" if by else "on its flash kernel"


def lower(spec: AttentionSpec, kernel: str = "on its flash kernel") -> Lowering:
    """Describe how a packed call reaches the entry."""
    notes = [Conversion("packed", f"torch's own entry for packed sequences, {kernel}")]
    copy = not (spec.storage.aligned and spec.storage.unit_stride)
    if copy:
        text = "query, key and value copied: the kernel needs 16-byte aligned rows and a contiguous head_dim"
        notes.append(Conversion("copy", text))
    if spec.head_dim % 8:
        notes.append(Conversion("pad_head_dim", f"head_dim {spec.head_dim} padded to a multiple of 8"))
    if spec.is_gqa:
        text = "key and value heads repeated in memory: the entry is called without shared ones"
        notes.append(Conversion("repeat_heads", text))
    return Lowering(ENTRY, copy=copy, conversions=tuple(notes))


@functools.cache
def _functions() -> tuple[Any, Any]:
    from torch.nn.attention import varlen

    return varlen.varlen_attn, varlen.AuxRequest(lse=True)


def _still_torchs_own() -> None:
    """Refuse where torch's entry was replaced after the call was decided: causal would be aligned to the other corner.

    Raises:
        RuntimeError: If it was.
    """
    if varlen_is_replaced():
        raise RuntimeError("torch's packed entry was replaced after this was decided; call anyattn.reset()")


def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Call it, on `(T, H, D)`."""
    spec = plan.spec
    if spec.mask.pattern is not None and not spec.same_lengths and not torch.compiler.is_compiling():
        _still_torchs_own()
    if plan.lowering.copy:
        query, key, value = realigned(query), realigned(key), realigned(value)
    if spec.is_gqa:
        times = spec.num_heads // spec.num_kv_heads
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    left_over = -spec.head_dim % 8
    if left_over:
        query, key, value = (F.pad(tensor, (0, left_over)) for tensor in (query, key, value))
    attend, with_lse = _functions()
    found = attend(
        query,
        key,
        value,
        parts.cu_seqlens_q,
        parts.cu_seqlens_k,
        spec.seqlen_q,
        spec.seqlen_kv,
        return_aux=with_lse,
        scale=spec.scale,
        window_size=(-1, -1) if spec.mask.pattern is None else (-1, 0),
    )
    out: Tensor = found[0][..., : spec.head_dim_v]
    if not (spec.return_lse or spec.sinks):
        return out
    lse = found[1].detach().float()
    return out, torch.where(lse == float("inf"), float("-inf"), lse)
