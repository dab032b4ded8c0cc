"""Packed sequences on torch's own flash kernel: `torch.nn.attention.varlen.varlen_attn`, since torch 2.11.

Source: torch 2.13, `torch/nn/attention/varlen.py`; an H100 with torch 2.11, the oldest seen to take these parameters.
For CUDA, in half precision. Causal attention is the window (-1, 0), aligned to the lower right; lse is `(H, T_q)`, with
+inf in rows without a key. There is no dropout. Shared heads are repeated, since the parameter for them isn't used.
Nothing is read on the host. What it writes for sequences without keys depends on the kernel (cuDNN from torch 2.14 on),
so `packed_rows` fills those rows.
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
CUDNN = "torch >= 2.14 runs it on cuDNN"


def takes(spec: AttentionSpec, env: Environment) -> bool:
    """Whether torch's own entry takes a packed call; otherwise the call is padded. Law: pure."""
    pattern = spec.mask.pattern
    if pattern is not None and not (pattern.is_causal and (spec.same_lengths or pattern.align == "lower_right")):
        return False
    device = env.device(spec.device_type, spec.device_index)
    if spec.forward_ad or spec.vmap or not spec.packed or device is None or device.arch is None or device.rocm:
        return False
    if not (8, 0) <= device.arch <= (12, 1):
        return False
    # GPUs with less shared memory than an A100 have no gradients for wide heads (torch's sdp_utils.cpp).
    most = 192 if spec.needs_grad and device.arch not in ((8, 0), (9, 0), (10, 0)) else 256
    wide = spec.head_dim != spec.head_dim_v or spec.head_dim > most
    plain = spec.scale > 0 and not spec.dropout_p and spec.softcap is None and not (spec.deterministic or wide)
    if not (plain and spec.dtype.itemsize == 2 and env.torch >= _SINCE):
        return False
    # torch checks only for a multiple of 8; cuDNN's own limits are those of native_cudnn.
    return replaced.takes_packed(spec, env) and not (may_be_cudnn(spec, env) and spec.head_dim > 128)


def may_be_cudnn(spec: AttentionSpec, env: Environment) -> bool:
    """Whether torch may run a packed call on cuDNN and not on flash (torch 2.14.1, `varlen.py`, by reading). Law: pure.

    The lengths on the host decide; with an unknown length it may be either.
    """
    device = env.device(spec.device_type, spec.device_index)
    if not spec.packed or device is None or device.arch is None or device.rocm or device.arch[0] not in (9, 10):
        return False
    new = env.torch >= _MAY_BE_CUDNN and env.cudnn is not None and env.cudnn >= (9, 18, 0)
    return new and spec.mask.pattern is None and (spec.seqlen_q == UNKNOWN or spec.seqlen_q > 128)


def declared(caps: Capabilities) -> Capabilities:
    """Return a kernel's declaration for the calls that `takes` accepts."""
    return caps.replace(varlen=True, causal=frozenset(("lower_right",)), causal_square=False, dead_rows=True)


def kernel_of(spec: AttentionSpec, env: Environment) -> str:
    """Return which kernel torch's entry runs a packed call on, in words. Law: pure."""
    if may_be_cudnn(spec, env):
        return "on cuDNN, or on flash for 128 queries at most" if spec.seqlen_q == UNKNOWN else "on cuDNN"
    by = replaced.origin(env, ("native_flash", "varlen_attn"))
    return f"with {by}" if by else "on its flash kernel"


def lower(spec: AttentionSpec, kernel: str = "on its flash kernel") -> Lowering:
    """Return how a packed call reaches the entry."""
    notes = [Conversion("packed", f"torch's own entry for packed sequences, {kernel}")]
    copy = not (spec.storage.aligned and spec.storage.unit_stride)
    if copy:
        text = "query, key and value copied: the kernel needs 16-byte aligned rows and a contiguous head_dim"
        notes.append(Conversion("copy", text))
    if spec.head_dim % 8:
        notes.append(Conversion("pad_head_dim", f"head_dim {spec.head_dim} padded to a multiple of 8"))
    if spec.is_gqa:
        text = "key and value heads repeated in memory: the entry is called without shared heads"
        notes.append(Conversion("repeat_heads", text))
    return Lowering(ENTRY, copy=copy, conversions=tuple(notes))


@functools.cache
def _functions() -> tuple[Any, Any]:
    from torch.nn.attention import varlen

    return varlen.varlen_attn, varlen.AuxRequest(lse=True)


def _still_torchs_own() -> None:
    """Check that torch's entry wasn't replaced since the decision: causal would be aligned to the upper left.

    Raises:
        RuntimeError: If it was.
    """
    if varlen_is_replaced():
        raise RuntimeError("torch's packed entry was replaced after this was decided; call anyattn.reset()")


def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Call the entry, on `(T, H, D)`."""
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
