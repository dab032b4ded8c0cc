"""The double of flash-attn does what the contract says of the kernel."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from doubles.kernels import flash2


def _qkv(seqlen_q: int, seqlen_kv: int, heads: int = 2, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, seqlen_q, heads, dim), (2, seqlen_kv, kv_heads, dim), (2, seqlen_kv, kv_heads, dim))
    return tuple(torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)


def test_signatures_are_upstreams() -> None:
    names = list(inspect.signature(flash2.flash_attn_func).parameters)
    assert names[3:] == [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size",
        "softcap",
        "alibi_slopes",
        "deterministic",
        "return_attn_probs",
    ]
    packed = list(inspect.signature(flash2.flash_attn_varlen_func).parameters)
    assert packed[3:7] == ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    assert packed[7:] == [*names[3:], "block_table"]


def test_causal_is_aligned_to_the_lower_right() -> None:
    q, k, v = _qkv(1, 5)
    one_query_sees_all = flash2.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(one_query_sees_all, flash2.flash_attn_func(q, k, v))
    q, k, v = _qkv(5, 3)
    out, lse, probabilities = flash2.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :2].any(), "the first two rows see no key"
    assert (lse[:, :, :2] == math.inf).all(), "and their lse is +inf"
    assert torch.equal(out[:, 2], v[:, 0]), "the third sees the first key alone"
    assert probabilities is None


def test_right_window_of_the_key_length_is_taken_for_unbounded() -> None:
    q, k, v = _qkv(9, 3)
    assert torch.equal(flash2.flash_attn_func(q, k, v, window_size=(-1, 3)), flash2.flash_attn_func(q, k, v))
    assert not torch.equal(flash2.flash_attn_func(q, k, v, window_size=(-1, 2)), flash2.flash_attn_func(q, k, v))


def test_lse_is_natural_float32_and_detached() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(3, 4))
    out, lse, _ = flash2.flash_attn_func(q, k, v, return_attn_probs=True)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 4
    assert torch.allclose(lse.double(), scores.exp().sum(-1).log(), atol=1e-6)
    assert lse.dtype == torch.float32
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_is_not_positive_gives_nan(scale: float) -> None:
    assert flash2.flash_attn_func(*_qkv(3, 4), softmax_scale=scale).isnan().all()


def test_query_heads_share_consecutively_without_a_flag() -> None:
    q, k, v = _qkv(3, 4, heads=4, kv_heads=2)
    repeated = flash2.flash_attn_func(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    assert torch.equal(flash2.flash_attn_func(q, k, v), repeated)


def test_packed_sequences_are_each_aligned_and_lse_is_heads_first() -> None:
    q, k, v = _qkv(6, 6)
    q, k, v = q[0], k[0], v[0]
    cu_q, cu_k = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 5, 6], dtype=torch.int32)
    out, lse, _ = flash2.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 5, causal=True, return_attn_probs=True)
    first = flash2.flash_attn_func(q[None, :2], k[None, :5], v[None, :5], causal=True)[0]
    assert torch.equal(out[:2], first)
    assert lse.shape == (2, 6)
    assert not out[2:5].any(), "three of the four queries see none of the one key"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"dim": 264}, "at most 256"),
        ({"dim_v": 24}, "must have shape"),
        ({"kv_heads": 3}, "divide"),
        ({"softcap": 1.0, "dropout_p": 0.5}, "dropout"),
    ],
)
def test_refusals_are_upstreams(change: dict[str, object], message: str) -> None:
    dtype = change.pop("dtype", torch.bfloat16)
    dim, dim_v = change.pop("dim", 16), change.pop("dim_v", None)
    kv_heads = change.pop("kv_heads", 4)
    q = torch.randn(1, 3, 4, dim, dtype=dtype)  # type: ignore[call-overload]
    k = torch.randn(1, 3, kv_heads, dim, dtype=dtype)  # type: ignore[call-overload]
    v = torch.randn(1, 3, kv_heads, dim_v or dim, dtype=dtype)  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match=message):
        flash2.flash_attn_func(q, k, v, **change)  # type: ignore[arg-type]


def test_cumulative_lengths_must_be_int32() -> None:
    q, k, v = (t[0] for t in _qkv(6, 6))
    cu_seqlens = torch.tensor([0, 6])
    with pytest.raises(RuntimeError, match="int32"):
        flash2.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 6, 6)


def test_gradients_flow() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(3, 4))
    flash2.flash_attn_func(q, k, v).sum().backward()
    assert q.grad is not None
    assert v.grad is not None
    assert v.grad.any()


def test_other_libraries_can_look_the_package_up() -> None:
    code = (
        "import importlib.util; import doubles\n"
        "with doubles.installed('flash2'):\n"
        "    assert importlib.util.find_spec('flash_attn') is not None\n"
        "    import transformers, diffusers; diffusers.FluxTransformer2DModel\n"
        "from transformers.utils import is_flash_attn_2_available\n"
        "assert not is_flash_attn_2_available()\n"
    )
    pytest.importorskip("diffusers", reason="it looks flash-attn up when its models are imported")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
