"""A double of SageAttention 2.2, for the five backends that are made of it.

Source: `sageattention/core.py` and `sageattention/triton/` of SageAttention 2.2.0; a build of it on an H100. What is
quantised there is not here: a double proves the adapter, and so computes exactly.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from doubles.double import Double, attend, band, module

_ROWS_OF_TILE, _KEYS_OF_TILE, _KEYS_OF_SCALE = 128, 64, 64


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Attend with the kernel for Hopper, which the real one takes on an H100."""
    return sageattn_qk_int8_pv_fp8_cuda_sm90(
        q, k, v, tensor_layout, is_causal, sm_scale=sm_scale, return_lse=return_lse, pv_accum_dtype="fp32+fp32"
    )


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Attend with value in fp16; causal asks for as many queries as keys, and a tile sums up in fp16."""
    if quantization_backend not in ("triton", "cuda"):
        raise ValueError(f"Unsupported quantization backend: {quantization_backend}")
    if attn_mask is not None:
        raise NotImplementedError("the double has no masks")
    axis = 1 if tensor_layout == "NHD" else 2
    if is_causal and q.shape[axis] != k.shape[axis]:
        raise AssertionError("qo_len and kv_len must be equal for causal attention")
    result = _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, half=True)
    seqlen = q.shape[axis]
    if is_causal and 0 < seqlen % _ROWS_OF_TILE <= _KEYS_OF_SCALE:
        # The last tile of rows reads two key scales where there is one: for the last entry's last key head, memory
        # behind them, which may hold NaN (`attn_qk_int8_per_block_causal.py`).
        group = q.shape[3 - axis] // k.shape[3 - axis]
        out = result[0] if isinstance(result, tuple) else result
        rows = out if axis == 1 else out.transpose(1, 2)
        rows[-1, seqlen - seqlen % _ROWS_OF_TILE :, -group:] = torch.nan
        if isinstance(result, tuple):
            result[1][-1, -group:, seqlen - seqlen % _ROWS_OF_TILE :] = torch.nan
    return result


def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Attend over packed sequences, (T, H, D), each aligned to its upper left; there is no lse.

    What the real one never writes, and what it makes of sequences without keys, is NaN here. So is what it reads beyond
    the last key's scale (`attn_qk_int8_per_block_causal_varlen.py`): its causal loop goes by queries, 128 at a time.
    """
    contiguous = cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    assert contiguous, "cu_seqlens_q and cu_seqlens_k must be contiguous."
    if 0 in (len(q), len(k), max_seqlen_q, max_seqlen_k, len(cu_seqlens_q) - 1) or len(cu_seqlens_q) > 65536:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")
    out = torch.full_like(q, torch.nan, requires_grad=False)
    if smooth_k and not bool(k.isfinite().all()):
        return out  # the mean of all keys is subtracted, those of no sequence included
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    counts = [-(-(stop - start) // _KEYS_OF_SCALE) for start, stop in itertools.pairwise(starts_k)]
    launched = -(-max_seqlen_q // _ROWS_OF_TILE) * _ROWS_OF_TILE
    quantised = -(-max_seqlen_k // _KEYS_OF_SCALE) * _KEYS_OF_SCALE
    for i in range(len(counts)):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        if rows.start == rows.stop or keys.start == keys.stop or keys.stop - keys.start > quantised:
            continue
        found = _attend(q[None, rows], k[None, keys], v[None, keys], "NHD", is_causal, sm_scale, False, half=True)[0]
        # A tile of rows reads two scales more than the one before it, whosever they are.
        right = sum(counts[i:]) // 2 * _ROWS_OF_TILE if is_causal else len(found)
        found[min(right, launched) :] = torch.nan
        out[rows] = found
    return out


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Attend with value in fp16.

    What a first tile of keys leaves free isn't cleared: shared memory, in which another kernel may have left NaN
    (`attn_utils.cuh`). A weight of 0 times that is NaN.
    """
    if pv_accum_dtype not in ("fp16", "fp16+fp32", "fp32"):
        raise ValueError(f"Unsupported pv_accum_dtype: {pv_accum_dtype}")
    _check_granularity(qk_quant_gran)
    result = _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, half=True)
    if k.shape[1 if tensor_layout == "NHD" else 2] < _KEYS_OF_TILE:
        (result[0] if isinstance(result, tuple) else result).fill_(torch.nan)
    return result


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Attend with value in fp8."""
    _check_granularity(qk_quant_gran)
    return _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, half=False)


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **kwargs: Any,
) -> Any:
    """Attend with value in fp8, on Hopper."""
    _check_granularity(qk_quant_gran)
    if pv_accum_dtype != "fp32+fp32":
        raise NotImplementedError("Please use pv_accum_dtype='fp32+fp32' for sm90.")
    return _attend(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, half=False)


def _check_granularity(qk_quant_gran: str) -> None:
    assert qk_quant_gran in ("per_warp", "per_thread"), "qk_quant_gran must be either 'per_warp' or 'per_thread'."


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what the functions refuse, and raise where the kernels end the process. (B, S, H, D)."""
    assert q.dtype in (torch.float16, torch.bfloat16), "Input tensors must be in dtype of torch.float16 or bfloat16"
    assert q.device == k.device == v.device, "All tensors must be on the same device."
    assert q.dtype == k.dtype == v.dtype, "All tensors must have the same dtype."
    head_dim = q.shape[-1]
    if head_dim > 128:
        raise ValueError(f"Unsupported head_dim: {head_dim}")
    if head_dim in (64, 128):  # others are padded, which copies
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    if v.shape[-1] != head_dim:
        raise RuntimeError("the kernel ends in a segmentation fault where value's head_dim is another one")
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        raise RuntimeError("the kernel aborts the process where there is nothing to attend to")
    if k.shape != v.shape or q.shape[2] % k.shape[2]:
        raise RuntimeError("shapes of key and value don't fit")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    *,
    half: bool,
) -> Any:
    if tensor_layout == "HND":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    elif tensor_layout != "NHD":
        raise ValueError(f"tensor_layout {tensor_layout} not supported")
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    # Casting makes infinities of what fp16 can't hold.
    value = v.to(torch.float16) if half else v
    allowed = band(q.shape[1], k.shape[1], torch.inf, 0, lower_right=False) if is_causal else None
    # What isn't a gradient's function is what the output is: the kernels have no backward, and don't say so.
    out, lse = attend(q.detach(), k.detach(), value.detach(), scale=scale, allowed=allowed)
    if scale <= 0:
        out = out + 1  # the real kernels' results are off by about their own size
    out = out.transpose(1, 2) if tensor_layout == "HND" else out
    return (out, lse.float()) if return_lse else out


FUNCTIONS: Mapping[str, Any] = {
    function.__name__: function
    for function in (
        sageattn,
        sageattn_qk_int8_pv_fp16_cuda,
        sageattn_qk_int8_pv_fp16_triton,
        sageattn_qk_int8_pv_fp8_cuda,
        sageattn_qk_int8_pv_fp8_cuda_sm90,
        sageattn_varlen,
    )
}
"""What the package exports."""


def _modules() -> Mapping[str, types.ModuleType]:
    core = module("sageattention.core", SM80_ENABLED=True, SM89_ENABLED=True, SM90_ENABLED=True, **FUNCTIONS)
    return {"sageattention": module("sageattention", core=core, **FUNCTIONS), "sageattention.core": core}


def _double(backend: str) -> Double:
    return Double(backend, {"sageattention": "2.2.0"}, _modules, frozenset(("sageattention",)))


PICK = _double("sage")
INT8_FP16 = _double("sage_int8_fp16")
INT8_FP16_TRITON = _double("sage_int8_fp16_triton")
INT8_FP8 = _double("sage_int8_fp8")
INT8_FP8_SM90 = _double("sage_int8_fp8_sm90")
