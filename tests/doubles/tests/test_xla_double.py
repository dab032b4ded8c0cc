"""The double of torch_xla's flash attention does what the contract says of the kernel."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from doubles.kernels.xla import default_matmul_precision, flash_attention


def _qkv(rows: int, keys: int, dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(1, 2, length, dim, dtype=dtype) for length in (rows, keys, keys))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, scale=scale).to(q.dtype)


def test_signature_is_upstreams() -> None:
    names = list(inspect.signature(flash_attention).parameters)
    assert names[:7] == ["q", "k", "v", "causal", "q_segment_ids", "kv_segment_ids", "sm_scale"]
    assert names[7:] == ["ab", "partition_spec", "mesh"]
    assert inspect.signature(flash_attention).parameters["sm_scale"].default == 1.0


def test_scale_is_one_and_ab_is_added_before_it() -> None:
    q, k, v = _qkv(5, 7)
    assert torch.equal(flash_attention(q, k, v), _sdpa(q, k, v))
    ab = torch.randn(1, 2, 5, 7)
    scaled = flash_attention(q, k, v, sm_scale=0.25, ab=ab)
    assert torch.equal(scaled, _sdpa(q, k, v, 0.25 * ab.double(), 0.25))


def test_causal_is_aligned_to_the_upper_left() -> None:
    q, k, v = _qkv(3, 7)
    assert torch.equal(flash_attention(q, k, v, causal=True)[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize(("keys", "masked"), [(512, True), (513, False), (1024, True)])
def test_zero_keys_take_part_beyond_a_block_where_no_ab_is_given(keys: int, masked: bool) -> None:
    q, k, v = _qkv(4, keys)
    assert torch.equal(flash_attention(q, k, v), _sdpa(q, k, v)) is masked
    assert torch.equal(flash_attention(q, k, v, ab=torch.zeros(1, 2, 4, keys)), _sdpa(q, k, v))


def test_causal_attention_of_one_query_runs_no_block() -> None:
    q, k, v = _qkv(1, 1024)
    assert not flash_attention(q, k, v, causal=True).any()
    q, k, v = (t.requires_grad_() for t in _qkv(1, 128))
    out = flash_attention(q, k, v, causal=True)
    assert out.any()
    out.sum().backward()
    assert v.grad is not None
    assert not v.grad.any()


def test_hidden_by_infinity_gives_no_number() -> None:
    q, k, v = _qkv(2, 600)
    ab = torch.zeros(1, 2, 2, 600)
    ab[..., :512] = float("-inf")
    assert bool(flash_attention(q, k, v, ab=ab).isnan().all())


@pytest.mark.parametrize(
    ("rows", "keys", "fits"),
    [(8, 128, True), (8, 100, False), (8, 384, False), (8, 600, False), (600, 128, False), (1536, 128, False)],
)
def test_backward_takes_whole_blocks_alone(rows: int, keys: int, fits: bool) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(rows, keys, 8))
    out = flash_attention(q, k, v)
    if fits:
        out.sum().backward()
        assert v.grad is not None
        assert bool(v.grad.any())
    else:
        with pytest.raises(ValueError, match=r"divide|lanes"):
            out.sum().backward()


def test_float32_is_multiplied_in_bfloat16_unless_jax_is_told_otherwise() -> None:
    q, k, v = _qkv(4, 4, dtype=torch.float32)
    truth = _sdpa(q, k, v)
    with default_matmul_precision("highest"):
        assert torch.equal(flash_attention(q, k, v), truth)
    assert not torch.allclose(flash_attention(q, k, v), truth, atol=1e-4)


def test_head_dim_above_a_lane_is_taken_in_whole_lanes() -> None:
    with pytest.raises(NotImplementedError, match="head_dim"):
        flash_attention(*_qkv(4, 600, 160))


def test_gradient_of_ab_comes_with_querys_alone() -> None:
    q, k, v = _qkv(4, 128)
    ab = torch.zeros(1, 2, 4, 128, requires_grad=True)
    assert not flash_attention(q, k, v, ab=ab).requires_grad
