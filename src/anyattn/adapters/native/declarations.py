"""What torch's SDPA kernels accept, per type of device.

Sources: torch 2.13 on CPU, run; `sdp_utils.cpp` and `MHA.cpp` of torch for CUDA; an H100 with torch 2.11.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from packaging.version import Version

from anyattn.backend.capabilities import Capabilities
from anyattn.backend.head_dims import HeadDims
from anyattn.environment import Environment
from anyattn.types.spec import Align, AttentionSpec

_HALF = frozenset((torch.float16, torch.bfloat16))
_FLOATS = _HALF | {torch.float32, torch.float64}
_UPPER: frozenset[Align] = frozenset(("upper_left",))
_ANY_DIM = 1 << 20

_MATH = Capabilities(
    dtypes=_FLOATS,
    rocm=True,
    head_dim_max=_ANY_DIM,
    head_dim_v=True,
    causal=_UPPER,
    boolean=True,
    bias=True,
    bias_float32=True,
    mask_grad=True,
    dead_rows=True,
    gqa=True,
    dropout=True,
    dropout_of_all=True,
    scale_any=True,
    lse=True,
    backward=True,
    deterministic=True,
    forward_ad=True,
    vmap=True,
    exact=True,
    unit_stride=False,
    aligned=False,
    compile=True,
    cuda_graph=True,
)

_FLASH_CPU = _MATH.replace(head_dim_v=False, mask_grad=False, dropout=False, dropout_of_all=False, forward_ad=False)

_FUSED_CUDA = Capabilities(
    dtypes=_HALF,
    arch_min=(8, 0),
    arch_max=(12, 1),
    head_dim_max=256,
    head_dim_multiple=8,
    gqa=True,
    # dropout_p == 1 raises, except in native_efficient, which keeps some weights (torch 2.11 on an H100).
    dropout=True,
    lse=True,
    backward=True,
    vmap=True,
    exact=True,
    unit_stride=False,
    compile=True,
    cuda_graph=True,
)

MATH: Mapping[str, Capabilities] = {"cpu": _MATH, "cuda": _MATH, "mps": _MATH, "xpu": _MATH}

FLASH: Mapping[str, Capabilities] = {
    "cpu": _FLASH_CPU,
    # The aten op aligns causal attention to the lower right (torch/nn/attention/bias.py uses it so);
    # head_dim is padded to a multiple of 8 before it, as SDPA itself does.
    "cuda": _FUSED_CUDA.replace(
        head_dim_multiple=1,
        causal=frozenset(("lower_right",)),
        dead_rows=True,
        deterministic=True,
        batch_max=65535,
    ),
}

EFFICIENT: Mapping[str, Capabilities] = {
    "cuda": _FUSED_CUDA.replace(
        dtypes=_HALF | {torch.float32},
        arch_min=(5, 0),
        head_dim_max=65536,
        head_dim_v=True,
        causal=_UPPER,
        boolean=True,
        bias=True,
        mask_grad=True,
        dead_rows=True,
        scale_any=True,
    ),
}

CUDNN: Mapping[str, Capabilities] = {
    "cuda": _FUSED_CUDA.replace(
        # Forward up to 256 was seen on an H100; torch's own limit on other GPUs, and for training, is 128.
        head_dims=(
            HeadDims(8, 128),
            HeadDims(9, 256, largest_grad=128),
            HeadDims(10, 256, largest_grad=128),
            HeadDims(11, 128),
            HeadDims(12, 128),
        ),
        head_dim_v=True,
        causal=_UPPER,
        boolean=True,
        bias=True,
        dead_rows=True,
        seqlen_kv_min=2,
        batch_max=65535,
    ),
}

NATIVE: Mapping[str, Capabilities] = {
    "cpu": _MATH,
    "cuda": _MATH,
    "mps": _MATH,
    "xpu": _MATH,
    # Shapes only: nothing is computed.
    "meta": _MATH.replace(lse=False),
}

_CPU_SHARED_HEADS_SINCE = Version("2.9")


def why_repeated(entry: str, spec: AttentionSpec, env: Environment) -> str:
    """Return why key and value heads are repeated for an entry; empty if they aren't.

    Source: torch's CPU flash op takes shared heads since pytorch pull request 157893, of torch 2.9.
    """
    if entry == "efficient" and (spec.is_gqa or spec.storage.expanded_kv):
        return "the kernel has no GQA and misreads expanded heads"
    if entry == "flash_cpu" and spec.is_gqa and env.torch < _CPU_SHARED_HEADS_SINCE:
        return "before torch 2.9 the CPU kernel reads past shared heads"
    return ""
