"""Lengths at which SageAttention's fp16 kernels read uninitialised memory, and how calls avoid them.

Source: `csrc/qattn/qk_int_sv_f16_cuda_sm80.cu`, `csrc/qattn/attn_utils.cuh` (`load_global_to_share`),
`sageattention/triton/attn_qk_int8_per_block_causal.py` and `csrc/fused/fused.cu` of SageAttention 2.2.0; NaN seen on an
H200 at these lengths, where memory held NaN before the call.

- `sageattn_qk_int8_pv_fp16_cuda` takes keys in tiles of 64. Rows of a tile beyond the last key are neither loaded nor
  cleared (`SharedMemFillMode::kNoFill`): shared memory holds what another kernel left there. Their weights are 0, and
  0 times NaN is NaN. After the first tile it holds the values of the tile before, so only calls with fewer than 64 keys
  are wrong. Zeros behind the tensors wouldn't help: nothing is read there.
- `sageattn_qk_int8_pv_fp16_triton`, causal, goes by queries in tiles of 128 and reads a key scale for each 64 of them.
  If the last tile has 64 queries or fewer, its second scale is another head's, or for the last head memory behind the
  scales. It is multiplied by the scores before they are masked, and may turn them into NaN.

The fp8 kernels are right: they quantise value into a buffer whose tail is zeros (`TransposePadPermuteKernel`, and
`torch.zeros` for Hopper), Hopper's loads fill with zeros, and other tails are int8, whose every value is finite. Scales
and the rows of the output are written in full. `sageattn_varlen` has the second fault too: see `packed`.

No argument limits the keys of a longer tensor, so the added keys must not change the softmax:

- Without a pattern, all keys and values are repeated: a key's copies share its weight, which changes no output, and
adds
  the logarithm of the number of copies to lse.
- With the causal pattern, keys are added after the last one, where no query sees them. They are the mean of the keys,
so
  the mean that the functions subtract from keys is the same; their values are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.adapters._flash import KernelCall
from anyattn.types.reasons import Conversion

ROWS, KEYS = 128, 64
"""The queries and the keys of a tile of the fp16 kernels."""

Result = tuple[Tensor, "Tensor | None"]
Attend = Callable[[KernelCall], Result]

_SHARED = "sageattn_qk_int8_pv_fp16_cuda"
_SCALES = "sageattn_qk_int8_pv_fp16_triton"


def note(entry: str, seqlen_q: int, seqlen_kv: int, *, causal: bool) -> Conversion | None:
    """Return the conversion that a call's lengths need, or None.

    Args:
        entry: The kernel's function, or `sageattn` with the function that it picks in parentheses.
        seqlen_q: The number of queries passed to the kernel.
        seqlen_kv: The number of keys passed to it.
        causal: Whether the causal pattern is passed to it.
    """
    if _SHARED in entry and seqlen_kv < KEYS:
        how = f"masked keys added up to {KEYS}" if causal else "all keys repeated"
        return Conversion("whole_tiles", f"{how}: the kernel doesn't clear the rest of a first tile of keys")
    if _SCALES in entry and causal and 0 < seqlen_q % ROWS <= KEYS:
        text = f"queries and masked keys added up to a multiple of {ROWS}: the kernel reads one key scale too many"
        return Conversion("whole_tiles", text)
    return None


def attend(entry: str, call: KernelCall, kernel: Attend) -> Result:
    """Call a kernel so that it reads no uninitialised memory.

    Args:
        entry: As for `note`.
        call: Tensors `(B, S, H, D)`.
        kernel: Returns the output `(B, S_q, H, D)`, and lse `(B, H, S_q)` or None.
    """
    causal = call.left == -1 and call.right == 0
    if note(entry, call.query.shape[1], call.key.shape[1], causal=causal) is None:
        return kernel(call)
    if _SCALES in entry:
        return _with_all_scales(call, kernel)
    return _causal_tile(call, kernel) if causal else _repeated(call, kernel)


def _repeated(call: KernelCall, kernel: Attend) -> Result:
    """Attend to every key several times, in at least one whole tile of keys."""
    count = call.key.shape[1]
    times = KEYS // count if KEYS % count == 0 else KEYS // count + 1
    key, value = (tensor.repeat(1, times, 1, 1) for tensor in (call.key, call.value))
    out, lse = kernel(call._replace(key=key, value=value, max_seqlen_kv=key.shape[1]))
    return out, None if lse is None else lse - math.log(times)


def _causal_tile(call: KernelCall, kernel: Attend) -> Result:
    """Attend causally to fewer keys than a tile; rows after the last key, which see all keys, need a second call."""
    rows, count = call.query.shape[1], call.key.shape[1]
    key, value = _mean_added(call.key, KEYS - count), F.pad(call.value, (0, 0, 0, 0, 0, KEYS - count))
    first = call._replace(key=key, value=value, max_seqlen_kv=KEYS)
    if rows <= count:
        return kernel(first)
    upper, upper_lse = kernel(first._replace(query=call.query[:, :count], max_seqlen_q=count))
    beyond = call._replace(query=call.query[:, count:], max_seqlen_q=rows - count, left=-1, right=-1)
    lower, lower_lse = _repeated(beyond, kernel)
    out = torch.cat((upper, lower), 1)
    if upper_lse is None or lower_lse is None:
        return out, None
    return out, torch.cat((upper_lse, lower_lse), -1)


def _with_all_scales(call: KernelCall, kernel: Attend) -> Result:
    """Attend causally with as many queries as keys; padded, so that each tile of rows has its two key scales."""
    count = call.query.shape[1]
    more = -count % ROWS
    query, value = (F.pad(tensor, (0, 0, 0, 0, 0, more)) for tensor in (call.query, call.value))
    whole = call._replace(query=query, key=_mean_added(call.key, more), value=value)
    out, lse = kernel(whole._replace(max_seqlen_q=count + more, max_seqlen_kv=count + more))
    return out[:, :count], None if lse is None else lse[..., :count]


def _mean_added(key: Tensor, more: int) -> Tensor:
    """Add keys `(B, more, H, D)` after the last one, each the mean of the others."""
    mean = key.mean(1, keepdim=True)
    return torch.cat((key, mean.expand(-1, more, -1, -1)), 1)
