"""Which repositories of the Hub hold the kernels, at which revision, and how they differ from the packages.

Repositories and versions are those that Diffusers 0.42.1 uses (`models/attention_dispatch.py`). A revision is given
where public projects record that they ran it; for the others no commit of the Hub's own repository is on record, and
the version, a branch that may move, is what there is. No revision was downloaded or run while this was written: the
machines at hand reach no Hub. What differs was read in github.com/huggingface/kernels-community.
"""

from __future__ import annotations

from anyattn.sources.hub import HubKernel

_DIFFUSERS = "diffusers 0.42.1, models/attention_dispatch.py"

FLASH2 = HubKernel(
    "kernels-community/flash-attn2",
    ("flash_attn_func", "flash_attn_varlen_func"),
    revision="81fb77c12b2ad5d69380669b46739d5868614502",
    source="a build against torch's stable ABI; the public projects msm_repro (torch 2.14, CUDA 13.0, an H100, trains "
    "with fewer key/value heads) and laya_blackwell record that they run it",
    note="there are builds for CPUs, which accept dropout and softcap and ignore them",
)
"""Signatures and conventions are those of flash-attn 2.8. Builds are for CUDA, ROCm, XPU and CPUs: only CUDA's are
declared, since `flash_attn_cpu/flash_api.cpp` takes dropout, softcap and seqused_k without using them, and leaves lse
undefined. Builds of this line for CUDA 12.8 were known to raise in a backward with fewer key/value heads
(kernels-community issue 1085); that the pinned one doesn't isn't on record."""

FLASH3 = HubKernel(
    "kernels-community/flash-attn3",
    ("flash_attn_func", "flash_attn_varlen_func"),
    revision="43f0bd269777115d94ff826e0d113ce9c1c9087b",
    source="a build against torch's stable ABI (2.9 and newer); the public projects wan-trainer and lightx2v_train "
    "record that they run it",
    note="lse comes with return_attn_probs=True",
)
"""Signatures and conventions are those of flash_attn_interface since 2025-08-29: `return_attn_probs=True` gives
`(out, lse)`, and without it there is a tensor alone. CUDA 12.6 to 13.0, sm90."""

FLASH4 = HubKernel(
    "kernels-community/flash-attn4",
    ("flash_attn_func", "flash_attn_varlen_func"),
    version=0,
    source=_DIFFUSERS,
    note="4.0.0.beta8 at most: the fourth argument is softmax_scale, not qv",
)
"""A beta of FlashAttention-4 before beta9 (`torch-ext/flash_attn4/__init__.py` says which): the fourth positional
argument is softmax_scale, and there are no qv, gather_kv_indices, min_seqlen_k and aux_scalars, so that everything
goes by keyword and those aren't passed. It always gives a tuple. Importing it replaces `cutlass.cute.compile` for the
whole process. It needs the Python package nvidia-cutlass-dsl."""

SAGE = HubKernel(
    "SageAttention/sage-attention",
    ("sageattn",),
    version=3,
    source=_DIFFUSERS,
    note="sageattn alone: the single kernels of SageAttention aren't exported",
)
"""`sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs)`: what isn't
named is swallowed, attn_mask, scale and dropout_p with it. It has no kernel for sm100, no varlen entry and no backward:
its output is detached. It raises RuntimeError where the build lacks the GPU's kernel. Causal is upper left."""

SAGE_BLACKWELL = HubKernel(
    "SageAttention/sage-blackwell",
    ("sageattn3_blackwell",),
    version=1,
    source=_DIFFUSERS,
    note="SageAttention 3, another kernel than sage-attention's",
)
"""`sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs)`, `(B, H, S, D)`: it
ignores attn_mask, swallows scale, and writes to the caller's key. See `anyattn.adapters.sage_blackwell`."""

AITER = HubKernel(
    "kernels-community/aiter-flash-attn-ck",
    ("flash_attn_func", "flash_attn_varlen_func"),
    version=1,
    source=_DIFFUSERS,
    note="forward only, bfloat16 only, head_dim 64 or 128",
)
"""ROCm, gfx942 and gfx950. Other than amd-aiter: there is no autograd, and outputs are detached; float16 raises
"invalid argument for fmha_fwd"; head_dim is 64 or 128; unknown keywords are swallowed, softcap and deterministic among
them; sinks are `s_aux`, not `sink_ptr`; windows have three parts. lse comes with `return_lse=True`; with
`return_attn_probs=True` alone the second part of the tuple is the dropout mask and not lse (`mha.py`)."""
