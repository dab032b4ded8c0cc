"""The double of SageAttention does what the contract says of the kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from doubles.kernels import sage

DENSE = [name for name in sage.FUNCTIONS if name != "sageattn_varlen"]
CUDA = [name for name in DENSE if "triton" not in name]

dense = pytest.mark.parametrize("function", [sage.FUNCTIONS[name] for name in DENSE], ids=DENSE)


def _qkv(seqlen_q: int, seqlen_kv: int, heads: int = 2, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, heads, seqlen_q, dim), (2, kv_heads, seqlen_kv, dim), (2, kv_heads, seqlen_kv, dim))
    return tuple(torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sageattn", "tensor_layout is_causal sm_scale return_lse"),
        (
            "sageattn_qk_int8_pv_fp16_triton",
            "tensor_layout quantization_backend is_causal attn_mask sm_scale smooth_k return_lse",
        ),
        (
            "sageattn_qk_int8_pv_fp16_cuda",
            "tensor_layout is_causal qk_quant_gran sm_scale pv_accum_dtype smooth_k smooth_v return_lse",
        ),
        (
            "sageattn_qk_int8_pv_fp8_cuda",
            "tensor_layout is_causal qk_quant_gran sm_scale pv_accum_dtype smooth_k smooth_v return_lse",
        ),
        (
            "sageattn_qk_int8_pv_fp8_cuda_sm90",
            "tensor_layout is_causal qk_quant_gran sm_scale pv_accum_dtype smooth_k return_lse",
        ),
        ("sageattn_varlen", "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k is_causal sm_scale smooth_k"),
    ],
)
def test_signatures_are_upstreams(name: str, parameters: str) -> None:
    assert list(inspect.signature(sage.FUNCTIONS[name]).parameters) == ["q", "k", "v", *parameters.split(), "kwargs"]


@dense
def test_unknown_keywords_are_swallowed(function: Callable[..., Any]) -> None:
    q, k, v = _qkv(5, 65)
    assert torch.equal(function(q, k, v, scale=9.0, dropout_p=0.5, window_size=(1, 0)), function(q, k, v))


@dense
def test_layouts_are_heads_first_and_sequence_first(function: Callable[..., Any]) -> None:
    q, k, v = _qkv(5, 67)
    out, lse = function(q, k, v, return_lse=True)
    other, other_lse = function(*(t.transpose(1, 2) for t in (q, k, v)), tensor_layout="NHD", return_lse=True)
    assert torch.equal(out, other.transpose(1, 2))
    assert torch.equal(lse, other_lse), "the lse is (B, H, S_q) in both"
    with pytest.raises(ValueError, match="tensor_layout"):
        function(q, k, v, tensor_layout="BSHD")


@dense
def test_lse_is_natural_and_float32_and_scale_is_the_roots(function: Callable[..., Any]) -> None:
    q, k, v = _qkv(3, 64)
    out, lse = function(q, k, v, return_lse=True)
    scores = q.double() @ k.double().transpose(-1, -2) / 4
    assert torch.allclose(lse.double(), scores.exp().sum(-1).log(), atol=1e-6)
    assert lse.dtype == torch.float32
    assert torch.equal(out, function(q, k, v, sm_scale=0.25))


@pytest.mark.parametrize("name", CUDA)
def test_causal_is_aligned_to_the_upper_left(name: str) -> None:
    function = sage.FUNCTIONS[name]
    q, k, v = _qkv(1, 65)
    assert torch.equal(function(q, k, v, is_causal=True), v[:, :, :1]), "one query sees the first key alone"
    q, k, v = _qkv(80, 66)
    assert torch.equal(function(q, k, v, is_causal=True)[:, :, 66:], function(q, k, v)[:, :, 66:])


def test_triton_kernel_wants_as_many_queries_as_keys_for_causal() -> None:
    with pytest.raises(AssertionError, match="must be equal"):
        sage.sageattn_qk_int8_pv_fp16_triton(*_qkv(1, 5), is_causal=True)


@dense
def test_output_is_detached_without_a_word(function: Callable[..., Any]) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(3, 64))
    assert not function(q, k, v).requires_grad


@dense
def test_query_heads_share_consecutively_without_a_flag(function: Callable[..., Any]) -> None:
    q, k, v = _qkv(3, 64, heads=4, kv_heads=2)
    assert torch.equal(function(q, k, v), function(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


@dense
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_is_not_positive_is_wrong_and_not_nan(function: Callable[..., Any], scale: float) -> None:
    q, k, v = _qkv(3, 64)
    right = (torch.softmax(q.double() @ k.double().transpose(-1, -2) * scale, -1) @ v.double()).bfloat16()
    out = function(q, k, v, sm_scale=scale)
    assert out.isfinite().all()
    assert float((out - right).norm() / right.norm()) > 0.5


@pytest.mark.parametrize(("name", "overflows"), [(name, "fp16" in name) for name in DENSE])
def test_bf16_values_overflow_where_value_goes_through_fp16(name: str, overflows: bool) -> None:
    q, k, v = _qkv(3, 64)
    out = sage.FUNCTIONS[name](q, k, torch.full_like(v, 70000.0))
    assert bool(out.isinf().all() | out.isnan().all()) == overflows


@dense
@pytest.mark.parametrize(
    ("shape_q", "shape_v", "error", "message"),
    [
        ((1, 2, 0, 16), (1, 2, 4, 16), RuntimeError, "aborts"),
        ((1, 2, 4, 16), (1, 2, 0, 16), RuntimeError, "aborts"),
        ((1, 2, 4, 16), (1, 2, 4, 24), RuntimeError, "segmentation"),
        ((1, 2, 4, 136), (1, 2, 4, 136), ValueError, "Unsupported head_dim"),
    ],
)
def test_what_ends_the_process_raises(
    function: Callable[..., Any], shape_q: tuple[int, ...], shape_v: tuple[int, ...], error: type, message: str
) -> None:
    q, v = torch.randn(shape_q, dtype=torch.float16), torch.randn(shape_v, dtype=torch.float16)
    k = torch.randn(*shape_v[:3], shape_q[3], dtype=torch.float16)
    with pytest.raises(error, match=message):
        function(q, k, v)


@dense
def test_assertions_are_upstreams(function: Callable[..., Any]) -> None:
    q, k, v = _qkv(3, 64)
    with pytest.raises(AssertionError, match="dtype"):
        function(q.float(), k.float(), v.float())
    with pytest.raises(AssertionError, match="same dtype"):
        function(q, k.half(), v)
    wide = torch.randn(1, 2, 4, 128, dtype=torch.float16)[..., ::2]
    with pytest.raises(AssertionError, match="contiguous"):
        function(wide, wide, wide)


def test_accumulators_are_upstreams() -> None:
    q, k, v = _qkv(3, 64)
    with pytest.raises(NotImplementedError, match="sm90"):
        sage.sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, pv_accum_dtype="fp32")
    with pytest.raises(ValueError, match="pv_accum_dtype"):
        sage.sageattn_qk_int8_pv_fp16_cuda(q, k, v, pv_accum_dtype="fp32+fp32")
    with pytest.raises(AssertionError, match="per_warp"):
        sage.sageattn_qk_int8_pv_fp8_cuda(q, k, v, qk_quant_gran="per_block")
    with pytest.raises(ValueError, match="quantization backend"):
        sage.sageattn_qk_int8_pv_fp16_triton(q, k, v, quantization_backend="cpu")


def _starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _packed(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> tuple[list[Tensor], tuple[Any, ...]]:
    tensors = [t[0].transpose(0, 1) for t in _qkv(sum(lengths_q), sum(lengths_k))]
    return tensors, (_starts(*lengths_q), _starts(*lengths_k), max(lengths_q), max(lengths_k))


def test_packed_sequences_are_each_aligned_to_the_upper_left() -> None:
    tensors, lengths = _packed((2, 4, 1), (5, 1, 70))
    out = sage.sageattn_varlen(*tensors, *lengths, is_causal=True)
    assert torch.equal(out[0], tensors[2][0])
    assert torch.equal(out[2:6], tensors[2][5:6].expand(4, -1, -1)), "every query of the second sees its one key"
    assert torch.equal(out[6], tensors[2][6])


def test_packed_sequences_have_no_lse_and_no_gradient_and_say_neither() -> None:
    tensors, lengths = _packed((2, 4), (5, 1))
    out = sage.sageattn_varlen(*(t.requires_grad_() for t in tensors), *lengths, return_lse=True, softcap=1.0)
    assert isinstance(out, Tensor)
    assert not out.requires_grad
    assert torch.equal(out, sage.sageattn_varlen(*tensors, *lengths))


def test_packed_sequences_that_are_empty_are_never_right() -> None:
    tensors, lengths = _packed((2, 4), (0, 6))
    out = sage.sageattn_varlen(*tensors, *lengths)
    assert out[:2].isnan().all()
    assert out[2:].isfinite().all()
    for tokens in (0, 1):
        tensors[tokens] = tensors[tokens][:0]
        with pytest.raises(RuntimeError, match="invalid argument"):
            sage.sageattn_varlen(*tensors, *lengths)


def test_packed_keys_of_no_sequence_are_in_the_mean_of_all() -> None:
    (q, k, v), lengths = _packed((2, 4), (5, 2))
    lengths = (lengths[0], _starts(5, 1), *lengths[2:])
    assert sage.sageattn_varlen(q, k, v, *lengths).isfinite().all()
    k[-1] = torch.nan
    assert sage.sageattn_varlen(q, k, v, *lengths).isnan().all()
    assert sage.sageattn_varlen(q, k, v, *lengths, smooth_k=False).isfinite().all()


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "right"),
    [((50,), (50,), 0), ((50,), (70,), 50), ((200,), (200,), 200), ((130,), (130,), 128), ((300, 1), (100, 1), 128)],
)
def test_packed_causal_rows_read_the_scale_of_keys_that_are_not_there(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], right: int
) -> None:
    tensors, lengths = _packed(lengths_q, lengths_k)
    out = sage.sageattn_varlen(*tensors, *lengths, is_causal=True)[: lengths_q[0]]
    assert out[:right].isfinite().all()
    assert out[right:].isnan().all()
    assert sage.sageattn_varlen(*tensors, *lengths).isfinite().all()


def test_packed_sequences_longer_than_said_are_left_unwritten() -> None:
    tensors, (cu_q, cu_k, _, _) = _packed((200,), (100,))
    assert sage.sageattn_varlen(*tensors, cu_q, cu_k, 100, 100)[128:].isnan().all()
    assert sage.sageattn_varlen(*tensors, cu_q, cu_k, 200, 60).isnan().all()
    with pytest.raises(AssertionError, match="contiguous"):
        sage.sageattn_varlen(*tensors, torch.stack((cu_q, cu_q), 1)[:, 0], cu_k, 200, 100)


def test_first_tile_of_keys_holds_what_nobody_wrote_in_the_fp16_kernel() -> None:
    function = sage.sageattn_qk_int8_pv_fp16_cuda
    for keys, right in ((1, False), (40, False), (63, False), (64, True), (65, True), (129, True)):
        out, lse = function(*_qkv(3, keys), return_lse=True)
        assert bool(out.isfinite().all()) == right, keys
        assert lse.isfinite().all()


def test_tritons_causal_kernel_reads_a_scale_that_nobody_wrote() -> None:
    function = sage.sageattn_qk_int8_pv_fp16_triton
    for length, first_wrong in ((7, 0), (64, 0), (65, 65), (128, 128), (129, 128), (192, 128), (193, 193)):
        out = function(*_qkv(length, length, heads=4), is_causal=True)
        wrong = out.isnan().any(-1)
        assert wrong[-1, -2:, first_wrong:].all(), "the last entry's last key head, in the last tile of rows"
        assert int(wrong.sum()) == 2 * (length - first_wrong)
        assert function(*_qkv(length, length)).isfinite().all(), "without a pattern it reads no such scale"
