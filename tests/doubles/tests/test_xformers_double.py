"""The double of xformers does what the contract says of the package."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from doubles.kernels import xformers as xf


def _qkv(
    seqlen_q: int, seqlen_kv: int, dim: int = 16, dim_v: int = 16, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, seqlen_q, 4, dim, dtype=dtype), torch.randn(2, seqlen_kv, 4, dim, dtype=dtype)
    return q, k, torch.randn(2, seqlen_kv, 4, dim_v, dtype=dtype)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two groups of two heads; key and value, of the first two heads, expanded."""
    k, v = (t[:, :, :2].unsqueeze(3).expand(-1, -1, -1, 2, -1) for t in (k, v))
    return q.view(2, q.shape[1], 2, 2, -1), k, v


@pytest.mark.parametrize("call", xf.CALLS.values())
def test_signatures_are_upstreams(call: object) -> None:
    parameters = inspect.signature(call).parameters  # type: ignore[arg-type]
    assert list(parameters) == ["query", "key", "value", "attn_bias", "p", "scale", "op", "output_dtype"]
    assert [name for name, parameter in parameters.items() if parameter.kind == parameter.KEYWORD_ONLY] == [
        "op",
        "output_dtype",
    ]


def test_lower_triangular_is_upper_left_and_the_other_lower_right() -> None:
    q, k, v = _qkv(1, 5)
    upper = xf.memory_efficient_attention(q, k, v, xf.LowerTriangularMask())
    assert torch.equal(upper, v[:, :1]), "the one query sees the first key alone"
    lower = xf.memory_efficient_attention(q, k, v, xf.LowerTriangularFromBottomRightMask())
    assert torch.equal(lower, xf.memory_efficient_attention(q, k, v))


def test_window_is_inclusive_and_lower_right() -> None:
    q, k, v = _qkv(2, 5)
    out = xf.memory_efficient_attention(q, k, v, xf.LocalAttentionFromBottomRightMask(0, 0))
    assert torch.equal(out, v[:, 3:])


def test_right_window_of_the_key_length_is_taken_for_unbounded() -> None:
    q, k, v = _qkv(9, 3)
    plain = xf.memory_efficient_attention(q, k, v)
    wide, narrow = (xf.LocalAttentionFromBottomRightMask(8, right) for right in (3, 2))
    assert torch.equal(xf.memory_efficient_attention(q, k, v, wide), plain)
    assert not torch.equal(xf.memory_efficient_attention(q, k, v, narrow), plain)


def test_windows_have_no_unbounded_side() -> None:
    with pytest.raises(ValueError, match="window_left"):
        xf.LocalAttentionFromBottomRightMask(-1, 0)


def test_flash_gives_lse_as_it_is_and_infinity_without_a_key() -> None:
    q, k, v = _qkv(5, 3)
    mask = xf.LowerTriangularFromBottomRightMask()
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    assert lse.shape == (2, 4, 5)
    assert (lse[:, :, :2] == math.inf).all()
    assert not out[:, :2].any()


def test_cutlass_pads_lse_to_32_with_infinity_and_gives_0_without_a_key() -> None:
    q, k, v = _qkv(5, 3, dtype=torch.float32)
    mask = xf.LowerTriangularFromBottomRightMask()
    _, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    assert lse.shape == (2, 4, 32)
    assert (lse[:, :, 5:] == math.inf).all()
    assert not lse[:, :, :2].any()
    assert lse.dtype == torch.float32


def test_groups_share_keys_and_lse_has_five_dimensions() -> None:
    q, k, v = _qkv(3, 4)
    out, lse = xf.memory_efficient_attention_forward_requires_grad(*_grouped(q, k, v))
    repeated = xf.memory_efficient_attention(q, *(t[:, :, :2].repeat_interleave(2, 2) for t in (k, v)))
    assert torch.equal(out.flatten(2, 3), repeated)
    assert lse.shape == (2, 2, 2, 3)


def test_groups_have_no_gradients_as_soon_as_one_is_needed() -> None:
    q, k, v = _qkv(3, 4)
    with pytest.raises(NotImplementedError, match="BMGHK"):
        xf.memory_efficient_attention(*_grouped(q.requires_grad_(), k, v))


def test_queries_expanded_along_heads_are_taken_for_one_head() -> None:
    q, k, v = _qkv(3, 4)
    q, k, v = _grouped(q[:, :, :1].expand(-1, -1, 4, -1), k, v)
    with pytest.raises(RuntimeError):
        xf.memory_efficient_attention(q, k, v)


def test_expanded_heads_are_misread_by_cutlass_in_a_tile_of_one_query() -> None:
    q, k, v = _qkv(65, 4, dtype=torch.float32)
    k, v = (t[:, :, :1].expand(-1, -1, 4, -1) for t in (k, v))
    assert xf.memory_efficient_attention(q, k, v).isnan().any()
    assert not xf.memory_efficient_attention(q, k.contiguous(), v.contiguous()).isnan().any()
    assert not xf.memory_efficient_attention(q[:, :64], k, v).isnan().any()


def test_gradient_of_a_bias_alone_is_dropped_without_an_error() -> None:
    q, k, v = _qkv(8, 8)
    bias = torch.zeros(2, 4, 8, 8, dtype=q.dtype, requires_grad=True)
    assert not xf.memory_efficient_attention(q, k, v, bias).requires_grad
    xf.memory_efficient_attention(q.requires_grad_(), k, v, bias).sum().backward()
    assert bias.grad is not None


def test_lse_and_the_forward_carry_no_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(3, 4))
    assert not any(t.requires_grad for t in xf.memory_efficient_attention_forward_requires_grad(q, k, v))
    assert not xf.memory_efficient_attention_forward(q, k, v).requires_grad
    assert xf.memory_efficient_attention(q, k, v).requires_grad


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_is_not_positive_gives_nan(scale: float) -> None:
    assert xf.memory_efficient_attention(*_qkv(3, 4), scale=scale).isnan().all()


def test_no_deterministic_gradients_where_cutlass_has_no_such_mask() -> None:
    q, k, v = _qkv(4, 4)
    window = xf.LocalAttentionFromBottomRightMask(1, 1)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(NotImplementedError, match="non-deterministic"):
            xf.memory_efficient_attention(q.requires_grad_(), k, v, window)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_bias": torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)}, ValueError, "Invalid shape"),
        ({"attn_bias": torch.ones(2, 4, 8, 8, dtype=torch.bool)}, TypeError, "finfo"),
        (
            {"attn_bias": torch.zeros(2, 4, 8, 7, dtype=torch.bfloat16), "seqlen_kv": 7},
            NotImplementedError,
            "stride",
        ),
        ({"attn_bias": type("Sub", (xf.LowerTriangularMask,), {})()}, NotImplementedError, "attn_bias type"),
        ({"dim": 44, "dim_v": 44}, NotImplementedError, r"shape\[-1\] % 8"),
        ({"dtype": torch.float64}, NotImplementedError, "dtype"),
        (
            {"attn_bias": xf.LocalAttentionFromBottomRightMask(1, 1), "dtype": torch.float32},
            NotImplementedError,
            "attn_bias type",
        ),
        (
            {"attn_bias": xf.LocalAttentionFromBottomRightMask(1, 1), "dim_v": 8},
            NotImplementedError,
            "attn_bias type",
        ),
        ({"p": 1.5}, ValueError, "dropout"),
    ],
)
def test_refusals_are_upstreams(change: dict[str, object], error: type[Exception], message: str) -> None:
    sizes = {name: change[name] for name in ("dim", "dim_v", "dtype") if name in change}
    q, k, v = _qkv(8, int(change.get("seqlen_kv", 8)), **sizes)  # type: ignore[arg-type, call-overload]
    given = {name: change[name] for name in ("attn_bias", "p") if name in change}
    with pytest.raises(error, match=message):
        xf.memory_efficient_attention(q, k, v, **given)  # type: ignore[arg-type]


def test_unequal_heads_and_dropout_with_lse_are_refused() -> None:
    q, k, v = _qkv(3, 4)
    with pytest.raises(ValueError, match="broadcasting"):
        xf.memory_efficient_attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(NotImplementedError, match="dropout"):
        xf.memory_efficient_attention_forward_requires_grad(q, k, v, p=0.5)


def _blocks(lengths_q: list[int], lengths_k: list[int] | None = None) -> xf.BlockDiagonalMask:
    return xf.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k, device=torch.device("cpu"))


def _packed(total_q: int, total_k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t[:1] for t in _qkv(total_q, total_k, dtype=dtype))  # type: ignore[return-value]


def test_blocks_see_themselves_alone_and_lse_is_packed() -> None:
    q, k, v = _packed(5, 6)
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, _blocks([2, 3], [4, 2]))
    assert lse.shape == (1, 4, 5)
    first, first_lse = xf.memory_efficient_attention_forward_requires_grad(q[:, :2], k[:, :4], v[:, :4])
    last, last_lse = xf.memory_efficient_attention_forward_requires_grad(q[:, 2:], k[:, 4:], v[:, 4:])
    assert torch.equal(out, torch.cat((first, last), 1))
    assert torch.equal(lse, torch.cat((first_lse, last_lse), -1))


def test_lse_of_packed_groups_has_four_dimensions() -> None:
    q, k, v = (t[:1] for t in _grouped(*_qkv(5, 5)))
    _, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, _blocks([2, 3]))
    assert lse.shape == (1, 2, 2, 5)


@pytest.mark.parametrize(
    ("made", "alone"),
    [
        (lambda mask: mask.make_causal(), xf.LowerTriangularMask()),
        (lambda mask: mask.make_causal_from_bottomright(), xf.LowerTriangularFromBottomRightMask()),
        # The window's size counts a row's own position.
        (lambda mask: mask.make_local_attention(2), xf.LocalAttentionFromBottomRightMask(1, 0)),
    ],
)
def test_pattern_of_blocks_is_each_blocks_own(
    made: Callable[[xf.BlockDiagonalMask], xf.BlockDiagonalMask], alone: xf.AttentionBias
) -> None:
    q, k, v = _packed(7, 7)
    out = xf.memory_efficient_attention(q, k, v, made(_blocks([4, 3])))
    parts = [
        xf.memory_efficient_attention(q[:, rows], k[:, rows], v[:, rows], alone) for rows in (slice(4), slice(4, 7))
    ]
    assert torch.equal(out, torch.cat(parts, 1))


def test_blocks_are_lists_on_the_host_and_starts_on_the_device_that_is_named() -> None:
    with pytest.raises(AssertionError):
        _blocks(torch.tensor([2, 3]))  # type: ignore[arg-type]
    mask = _blocks([2, 0, 3], [1, 4, 0])
    assert mask.q_seqinfo.seqstart.tolist() == mask.q_seqinfo.seqstart_py == [0, 2, 2, 5]
    assert mask.k_seqinfo.seqstart.dtype == torch.int32
    assert (mask.k_seqinfo.min_seqlen, mask.k_seqinfo.max_seqlen) == (0, 4)
    assert _blocks([2, 3]).k_seqinfo is not _blocks([2, 3]).q_seqinfo
    same = _blocks([2, 3], [2, 3])
    assert same.k_seqinfo is same.q_seqinfo
    elsewhere = xf.BlockDiagonalMask.from_seqlens([2, 3])
    with pytest.raises(ValueError, match="same device"):
        xf.memory_efficient_attention(*_packed(5, 5), elsewhere)


def test_block_without_keys_gets_rubbish_and_an_infinite_lse() -> None:
    q, k, v = _packed(5, 3)
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, _blocks([2, 3], [0, 3]))
    assert (lse[:, :, :2] == math.inf).all()
    assert out[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _blocks([2, 3], [5]), AssertionError, None),
        (lambda: _blocks([3], [2]).make_causal_from_bottomright(), ValueError, "num_keys >= num_queries"),
        (lambda: _blocks([3]).make_local_attention(0), ValueError, "window_size > 0"),
        (lambda: _blocks([3], [1]).make_local_attention(2), RuntimeError, "No keys"),
        (lambda: xf.memory_efficient_attention(*_qkv(5, 5), _blocks([2, 3])), ValueError, "batch_size=1"),
        (lambda: xf.memory_efficient_attention(*_packed(5, 5), _blocks([2, 2])), RuntimeError, "illegal memory"),
        (
            lambda: xf.memory_efficient_attention(*_packed(5, 6), _blocks([2, 3], [3, 3]).make_causal()),
            NotImplementedError,
            "equal numbers",
        ),
        (
            lambda: xf.memory_efficient_attention(*_packed(5, 5, torch.float32), _blocks([2, 3])),
            NotImplementedError,
            "attn_bias type",
        ),
    ],
)
def test_refusals_of_blocks(call: Callable[[], object], error: type[Exception], message: str | None) -> None:
    with pytest.raises(error, match=message):
        call()
