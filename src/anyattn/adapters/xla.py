"""torch_xla's flash attention on TPUs: `torch_xla.experimental.custom_kernel.flash_attention`.

Sources: `torch_xla/experimental/custom_kernel.py` of torch_xla 2.9 and of pytorch/xla 41398bff, and the kernel that it
calls, jax's `pallas/ops/tpu/flash_attention.py` (078fd687). No TPU has run this adapter: a contract double stands in.

What needs care: the scale defaults to 1. `ab` is added before the scale. Padded keys are masked only if `ab` is passed.
Causal attention of a single query runs no block. Masked positions are large negative numbers and not -inf. The backward
takes lengths in whole blocks only. `torch.ops.xla.flash_attention` is never called: off an XLA device it returns
uninitialised memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.adapters import _dense
from anyattn.adapters._dense import KernelCall
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend, Lowering, Output, Parts, Plan
from anyattn.environment import Environment
from anyattn.lowering.dense import pattern_mask
from anyattn.lowering.lse import repeat_heads
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec, PatternSpec

_XLA = Capabilities(
    dtypes=frozenset((torch.bfloat16, torch.float32)),
    # No limit is documented; larger ones would need more of a TPU's vector memory than was ever tried.
    head_dim_max=256,
    causal=frozenset(("upper_left",)),
    realigns=True,
    boolean=True,
    bias=True,
    bias_float32=True,
    dead_rows=True,
    gqa=True,
    backward=True,
    exact=True,
    unit_stride=False,
    aligned=False,
)

_BLOCK = 512
"""More keys than one block are padded to whole blocks."""

_LANES = 128
_FAR = 1e37


class Xla(Backend):
    """torch_xla's flash attention."""

    name = "xla"
    family = "xla"
    aliases = ("_native_xla",)
    auto_rank = 5
    packages = (
        Package(
            "torch-xla",
            "torch_xla.experimental.custom_kernel",
            ("flash_attention",),
            ">=2.5",
            "pip install 'torch_xla[tpu,pallas]{versions}'",
            note="`ab` came with 2.5, `sm_scale` with 2.4",
        ),
    )
    declarations: ClassVar[Mapping[str, Capabilities]] = {"xla": _XLA}

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from super().availability(env)
        device = env.device("xla")
        if device is not None and device.name != "TPU":
            got = f"an XLA device of type {device.name or 'unknown'}"
            yield Reason("no_device", "a TPU", got, "set PJRT_DEVICE=TPU if there is one, or choose another backend")

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if 0 < spec.scale < 1e-9:
            yield Reason("scale", "scale >= 1e-9 (the kernel's bias is divided by it)", str(spec.scale))
        if spec.dtype == torch.float32 and spec.needs_grad:
            need = "bfloat16 if gradients are needed (a TPU's backward multiplies in bfloat16 by default)"
            yield Reason("dtype", need, "float32", "cast query, key and value")

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        caps = self.declarations[spec.device_type]
        lowering = _dense.lower("flash_attention", caps, spec, copies=False)
        pattern = lowering.pattern
        keys = spec.seqlen_kv if pattern is None or pattern.keys is None else pattern.keys[1] - pattern.keys[0]
        notes = list(lowering.conversions)
        if spec.is_gqa:
            notes.append(Conversion("repeat_heads", "key and value's heads repeated"))
        if _whole(keys, backward=spec.needs_grad) != keys:
            notes.append(Conversion("pad_keys", "keys padded to whole blocks, and the padding masked"))
        if _whole_rows(spec.seqlen_q, backward=spec.needs_grad) != spec.seqlen_q:
            notes.append(Conversion("pad_rows", "queries padded to whole blocks, and the padding cut off"))
        if spec.head_dim > _LANES and spec.head_dim % _LANES:
            notes.append(Conversion("pad_head_dim", f"head_dim padded to a multiple of {_LANES}"))
        # Every row sees a single key; the kernel's causal code would run no block for one query.
        is_causal = lowering.is_causal and keys != 1
        return dataclasses.replace(lowering, is_causal=is_causal, conversions=tuple(notes))

    def load(self) -> None:
        import importlib

        jax = importlib.import_module("jax")
        found = self.packages[0].load()
        FUNCTIONS[self.name] = types.SimpleNamespace(
            flash_attention=found.flash_attention, precision=jax.default_matmul_precision
        )

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _dense.attend(plan, query, key, value, parts, _call)


def _whole(length: int, *, backward: bool) -> int:
    """Return the number of keys that the kernel takes: whole blocks, and for its backward whole lanes."""
    if length > _BLOCK or (backward and length > _BLOCK // 2):
        return -(-length // _BLOCK) * _BLOCK
    return -(-length // _LANES) * _LANES if backward else length


def _whole_rows(length: int, *, backward: bool) -> int:
    """Return the number of queries that the kernel takes: its backward takes 1024 at a time if there are over 512."""
    return -(-length // (2 * _BLOCK)) * 2 * _BLOCK if backward and length > _BLOCK else length


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    spec, functions = plan.spec, FUNCTIONS[plan.backend]
    query, key, value = call.query, call.key, call.value
    if spec.layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    times = spec.num_heads // spec.num_kv_heads
    key, value = repeat_heads(key, times), repeat_heads(value, times)
    batch, heads, rows, dim = query.shape
    keys = key.shape[2]
    more_rows = _whole_rows(rows, backward=spec.needs_grad) - rows
    more_keys = _whole(keys, backward=spec.needs_grad) - keys
    mask, causal = call.mask, plan.lowering.is_causal
    if more_keys and mask is None and not (causal and rows <= keys):
        # Padded keys would take part in the softmax: only `ab` masks them, or the causal flag if S_q <= S_kv.
        mask = _nothing_hidden(causal, rows, keys, query.device)
        causal = False
    ab = None
    if mask is not None:
        ab = _before_scale(mask, spec.scale, (rows, keys), (more_rows, more_keys)).expand(batch, heads, -1, -1)
        ab = ab.contiguous()
    # A head_dim above 128, the number of lanes, must be a multiple of it.
    more_dim = -dim % _LANES if dim > _LANES else 0
    query, key, value = (
        F.pad(tensor, (0, more_dim, 0, more)) if more or more_dim else tensor
        for tensor, more in ((query, more_rows), (key, more_keys), (value, more_keys))
    )
    # On a TPU jax multiplies float32 in bfloat16 by default.
    precise = functions.precision("highest") if spec.dtype == torch.float32 else contextlib.nullcontext()
    with precise:
        out = functions.flash_attention(query, key, value, causal=causal, sm_scale=spec.scale, ab=ab)
    out = out[:, :, :rows, :dim]
    return (out.transpose(1, 2) if spec.layout == "BSHD" else out), None


def _nothing_hidden(causal: bool, rows: int, keys: int, device: torch.device) -> Tensor:
    if causal:
        return pattern_mask(PatternSpec(-1, 0, "upper_left"), rows, keys, device)[None, None]
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _before_scale(mask: Tensor, scale: float, lengths: tuple[int, int], more: tuple[int, int]) -> Tensor:
    """Convert a mask to what is added before the scale: float32, padded, finite.

    The kernel can't take -inf (a block of it gives NaN), so masked positions get a number far below every bias. Biases
    beyond +-far are compressed, in the same order, so that the division by the scale stays finite.
    """
    far = _FAR * min(1.0, scale)
    if mask.dtype == torch.bool:
        added = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -8 * far)
    else:
        bias = mask.detach().float()
        small = bias * (far / 4e38)
        added = torch.minimum(torch.maximum(bias, small - far), small + far)
        added = added.masked_fill(bias == float("-inf"), -8 * far)
    added = added.expand(*added.shape[:2], *lengths) / scale
    added = F.pad(added, (0, more[1]), value=-8 * far / scale)
    return F.pad(added, (0, 0, 0, more[0]))
