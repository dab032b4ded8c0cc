"""What each kernel of SageAttention accepts; the sources are in the package's docstring."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from anyattn.backend.capabilities import Capabilities
from anyattn.environment import Arch

FP8 = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16)),
    arch_min=(8, 9),
    head_dim_max=128,
    causal=frozenset(("upper_left",)),
    realigns=True,
    # Only patterns leave rows without a key, which are left out before the call.
    dead_rows=True,
    gqa=True,
    lse=True,
    quantised="fp8",
    # Tensors that aren't aligned, or contiguous along head_dim, are copied.
    unit_stride=False,
    # Launch grids hold heads and batch in their y and z (qk_int_sv_f8_cuda_sm90.cu).
    batch_max=65535,
    # The functions call torch.cuda.set_device, and don't restore the device.
    device_guard=True,
    # No launch in csrc/ names a stream.
    default_stream=True,
)
# Value is cast to fp16, whose largest number is 65504: larger bf16 values become infinite.
FP16 = FP8.replace(arch_min=(8, 0), quantised="int8", value_max=65504.0)
TRITON = FP16.replace(
    # `core.py`: the Triton kernel isn't usable on sm120.
    arch_max=(10, 3),
    # An assertion checks it, which python -O drops (attn_qk_int8_per_block_causal.py).
    causal=frozenset(("upper_left", "lower_right")),
    causal_square=True,
    # Sums over a tile of 64 keys are in fp16.
    value_max=65504.0 / 64,
)
PACKED = TRITON.replace(
    # `sageattn_varlen` doesn't compare lengths; `packed` avoids those at which it is wrong.
    causal=frozenset(("upper_left",)),
    causal_square=False,
    key_mask=True,
    varlen=True,
    lse=False,
    # `packed` may add one sequence to a call.
    batch_max=65534,
)
"""What `sageattn_varlen` accepts: packed sequences, and key masks, whose keys are packed for it."""

PICKS: Mapping[Arch, tuple[str, Capabilities]] = {
    (8, 0): ("sageattn_qk_int8_pv_fp16_cuda", FP16),
    (8, 6): ("sageattn_qk_int8_pv_fp16_triton", TRITON),
    (8, 9): ("sageattn_qk_int8_pv_fp8_cuda", FP8),
    (9, 0): ("sageattn_qk_int8_pv_fp8_cuda_sm90", FP8),
    (12, 0): ("sageattn_qk_int8_pv_fp8_cuda", FP8),
    (12, 1): ("sageattn_qk_int8_pv_fp8_cuda", FP8),
}
"""The kernel that `sageattn` uses, and what it accepts."""
