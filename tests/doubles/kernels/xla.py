"""A double of torch_xla's flash attention, with a jax that knows of matmul precision alone.

Sources: `torch_xla/experimental/custom_kernel.py` of torch_xla 2.9, and jax's `pallas/ops/tpu/flash_attention.py`
(078fd687). No TPU was run.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doubles.double import Double, band, module

_BLOCK = 512
_LANES = 128
_HIDDEN = -0.7 * torch.finfo(torch.float32).max
_precision: list[str] = []


@contextlib.contextmanager
def default_matmul_precision(precision: str) -> Iterator[None]:
    """Say how jax multiplies float32 inside the block; by default a TPU does in bfloat16."""
    _precision.append(precision)
    try:
        yield
    finally:
        _precision.pop()


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    q_segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None,
    sm_scale: float = 1.0,
    *,
    ab: Tensor | None = None,
    partition_spec: Any = None,
    mesh: Any = None,
) -> Tensor:
    """Attention, `(B, H, S, D)`; causal is aligned to the upper left, and `ab` added before the scale."""
    if q_segment_ids is not None or kv_segment_ids is not None or partition_spec is not None or mesh is not None:
        raise NotImplementedError("the double has no segment ids and no sharding")
    _check(q, k, v, ab)
    backward = _unfit(q, k)
    if q.dtype == torch.float32 and "highest" not in _precision:
        q, k = (tensor + (tensor.bfloat16().float() - tensor).detach() for tensor in (q, k))
    if ab is not None and not q.requires_grad:
        ab = ab.detach()  # its gradient comes with query's alone
    more = -k.shape[2] % _BLOCK if k.shape[2] > _BLOCK else 0
    if more:
        k, v = F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))
        if ab is not None:
            ab = F.pad(ab, (0, more), value=torch.finfo(ab.dtype).min)
    out = _attend(q, k, v, causal, sm_scale, ab)
    if causal and q.shape[2] == 1:
        # A block runs where its last row lies *after* the first key: that of a single query doesn't.
        ran = 1.0 if k.shape[2] <= _BLOCK else 0.0
        out = _Backward.apply(out * ran, "", 0.0)  # type: ignore[no-untyped-call]
    checked: Tensor = _Backward.apply(out, backward, 1.0)  # type: ignore[no-untyped-call]
    return checked


class _Backward(torch.autograd.Function):
    """Passes the gradient on, times a factor, where the backward takes the lengths."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, problem: str, factor: float) -> Tensor:
        ctx.problem, ctx.factor = problem, factor
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.problem:
            raise ValueError(ctx.problem)
        return grad * ctx.factor, None, None


def _unfit(q: Tensor, k: Tensor) -> str:
    """Say why the backward doesn't take the lengths, or nothing: it gets them as they came, in whole blocks."""
    rows, keys = q.shape[2], k.shape[2]
    for name, length, block in (
        ("block_q_major_dkv", rows, min(_BLOCK, rows)),
        ("block_q_dq", rows, min(2 * _BLOCK, rows)),
        ("block_k_major_dkv", keys, min(_BLOCK, keys)),
        ("block_k_dq", keys, min(_BLOCK // 2, keys)),
    ):
        if length % block:
            return f"{name}={block} should divide {length}"
    return f"a block of {keys} keys isn't whole lanes of {_LANES}" if keys % _LANES else ""


def _check(q: Tensor, k: Tensor, v: Tensor, ab: Tensor | None) -> None:
    if q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError("float32 and bfloat16 alone were ever tried")
    if q.shape[1] != k.shape[1] or q.shape[-1] != v.shape[-1]:
        raise AssertionError("unchecked upstream, and wrong: as many key/value heads, and one head_dim")
    if k.shape[2] > _BLOCK and q.shape[-1] > _LANES and q.shape[-1] % _LANES:
        raise NotImplementedError(f"head_dim={q.shape[-1]} should be a multiple of {_LANES} if larger")
    if ab is not None and tuple(ab.shape) != (*q.shape[:3], k.shape[2]):
        raise ValueError("Attention bias shape mismatch")


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, ab: Tensor | None) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double())
    if ab is not None:
        scores = _float32_range(scores + ab.double())
    scores = _float32_range(scores * scale)
    if causal:
        scores = scores + torch.where(band(q.shape[2], k.shape[2], math.inf, 0, lower_right=False), 0.0, _HIDDEN)
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - top)  # no number where a row is all -inf
    out = torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), v.double())
    if k.shape[2] > _BLOCK:
        # Taken block by block: one that is all -inf so far leaves no number behind.
        first = torch.isneginf(scores[..., :_BLOCK]).all(-1, keepdim=True)
        out = torch.where(first, math.nan, out)
    return out.to(q.dtype)


def _float32_range(scores: Tensor) -> Tensor:
    most = torch.finfo(torch.float32).max
    return torch.where(scores.abs() > most, scores.sign() * math.inf, scores)


def _modules() -> Mapping[str, types.ModuleType]:
    functions: dict[str, Any] = {"flash_attention": flash_attention}
    kernel = module("torch_xla.experimental.custom_kernel", **functions)
    experimental = module("torch_xla.experimental", custom_kernel=kernel)
    return {
        "jax": module("jax", default_matmul_precision=default_matmul_precision),
        "torch_xla": module("torch_xla", __version__="2.9.0", experimental=experimental),
        "torch_xla.experimental": experimental,
        "torch_xla.experimental.custom_kernel": kernel,
    }


DOUBLE = Double("xla", {"torch-xla": "2.9.0"}, _modules, device_type="xla")
