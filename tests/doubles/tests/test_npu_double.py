"""The double of torch_npu does what the contract says of the kernel."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from doubles.kernels.npu import npu_fusion_attention

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def _qkv(rows: int, keys: int, heads: int = 2, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, heads, rows, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, dim))
    return tuple(torch.randn(shape) for shape in shapes)


def test_signature_is_upstreams() -> None:
    parameters = list(inspect.signature(npu_fusion_attention).parameters.values())
    assert [p.name for p in parameters[:5]] == ["query", "key", "value", "head_num", "input_layout"]
    assert {p.kind for p in parameters[5:]} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {p.name: p.default for p in parameters[5:]}
    assert defaults["scale"] == defaults["keep_prob"] == 1.0
    assert defaults["pre_tockens"] == defaults["next_tockens"] == 2**31 - 1
    assert {"pse", "padding_mask", "atten_mask", "inner_precise", "sparse_mode", "softmax_layout", "sink"} <= set(
        defaults
    )


def test_gives_seven_things_and_the_scale_is_one() -> None:
    q, k, v = _qkv(3, 5)
    result = npu_fusion_attention(q, k, v, 2, "BNSD")
    assert len(result) == 7
    assert torch.allclose(result[0], F.scaled_dot_product_attention(q, k, v, scale=1.0), atol=1e-5)
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    assert result[1].shape == result[2].shape == (2, 2, 3, 8)
    assert torch.allclose((result[1] + result[2].log())[..., 7], scores.logsumexp(-1), atol=1e-5)


def test_true_in_the_mask_is_hidden() -> None:
    q, k, v = _qkv(3, 5)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 2:] = True
    out = npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=hidden)[0]
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k[:, :, :2], v[:, :, :2], scale=1.0), atol=1e-5)


def test_sparse_mode_without_a_mask_is_full_attention() -> None:
    q, k, v = _qkv(5, 5)
    full = npu_fusion_attention(q, k, v, 2, "BNSD")[0]
    assert torch.equal(npu_fusion_attention(q, k, v, 2, "BNSD", sparse_mode=2, next_tockens=0)[0], full)


@pytest.mark.parametrize(("mode", "seen"), [(2, 1), (3, 3)])
def test_mode_2_is_upper_left_and_mode_3_lower_right(mode: int, seen: int) -> None:
    q, k, v = _qkv(3, 5)
    out = npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=TRIANGLE, sparse_mode=mode)[0]
    first = F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :seen], v[:, :, :seen], scale=1.0)
    assert torch.allclose(out[:, :, :1], first, atol=1e-5)


def test_causal_modes_take_the_compressed_mask_alone() -> None:
    q, k, v = _qkv(5, 5)
    with pytest.raises(RuntimeError, match="2048"):
        npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=TRIANGLE[:5, :5], sparse_mode=2)
    full = npu_fusion_attention(q, k, v, 2, "BNSD")[0]
    assert torch.equal(npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=~TRIANGLE, sparse_mode=2)[0], full)


def test_mask_is_cut_at_pre_tockens_from_the_upper_left() -> None:
    q, k, v = _qkv(5, 5)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    out = npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=nothing, pre_tockens=0, next_tockens=0)[0]
    assert torch.allclose(out, v, atol=1e-6)


def test_mask_is_not_broadcast_along_queries() -> None:
    q, k, v = _qkv(3, 5)
    with pytest.raises(RuntimeError, match="shapes"):
        npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=torch.zeros(2, 1, 1, 5, dtype=torch.bool))


@pytest.mark.parametrize(("precise", "others_spoilt"), [(0, True), (2, False)])
def test_rows_without_a_key_are_unspecified_and_spoil_others_unless_asked_not_to(
    precise: int, others_spoilt: bool
) -> None:
    q, k, v = _qkv(3, 5)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[0] = True
    out = npu_fusion_attention(q, k, v, 2, "BNSD", atten_mask=hidden, inner_precise=precise)[0]
    assert bool(out[:, :, 0].isnan().all())
    assert bool(out[:, :, 1:].isnan().any()) is others_spoilt


@pytest.mark.parametrize(
    ("change", "message"),
    [({"keep_prob": 0.0}, "keep_prob"), ({"head_num": 4}, "head_num"), ({"pse": torch.zeros(1)}, "pse")],
)
def test_refusals_are_upstreams(change: dict[str, object], message: str) -> None:
    q, k, v = _qkv(3, 5)
    heads = change.pop("head_num", 2)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        npu_fusion_attention(q, k, v, heads, "BNSD", **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "dim"), [(257, 4), (2, 776)])
def test_sizes_are_limited(heads: int, dim: int) -> None:
    with pytest.raises(RuntimeError, match="must be in"):
        npu_fusion_attention(*_qkv(3, 5, heads, heads, dim), heads, "BNSD")


def test_layout_bsnd_is_the_same_transposed_and_heads_are_shared() -> None:
    q, k, v = _qkv(3, 5, heads=4, kv_heads=2)
    out = npu_fusion_attention(q, k, v, 4, "BNSD")[0]
    swapped = npu_fusion_attention(*(t.transpose(1, 2) for t in (q, k, v)), 4, "BSND")[0]
    assert torch.equal(out, swapped.transpose(1, 2))
    repeated = npu_fusion_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), 4, "BNSD")[0]
    assert torch.equal(out, repeated)


def _packed(lengths_q: list[int], lengths_k: list[int], heads: int = 2, kv_heads: int = 2) -> tuple[Tensor, ...]:
    q, k, v = _qkv(sum(lengths_q), sum(lengths_k), heads, kv_heads)
    return tuple(tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v))


def _ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def _tnd(lengths_q: list[int], lengths_k: list[int], **options: Any) -> tuple[Any, ...]:
    ends = {"actual_seq_qlen": _ends(lengths_q), "actual_seq_kvlen": _ends(lengths_k)}
    return npu_fusion_attention(*_packed(lengths_q, lengths_k), 2, "TND", **(ends | options))  # type: ignore[arg-type]


def _alone(lengths_q: list[int], lengths_k: list[int], index: int, **options: Any) -> tuple[Any, ...]:
    rows, keys = (slice(sum(lengths[:index]), sum(lengths[: index + 1])) for lengths in (lengths_q, lengths_k))
    q, k, v = _packed(lengths_q, lengths_k)
    return npu_fusion_attention(q[None, rows], k[None, keys], v[None, keys], 2, "BSND", **options)


@pytest.mark.parametrize("options", [{}, {"sparse_mode": 2, "atten_mask": TRIANGLE}])
def test_layout_tnd_attends_in_each_sequence_and_has_ends_without_the_0(options: dict[str, Any]) -> None:
    lengths = [3, 4], [2, 6]
    out = _tnd(*lengths, **options)[0]
    alone = torch.cat([_alone(*lengths, index, **options)[0][0] for index in (0, 1)])
    assert torch.allclose(out, alone, atol=1e-6)


def test_mode_3_is_aligned_to_each_sequences_lower_right() -> None:
    lengths = [3, 4], [3, 6]
    options = {"sparse_mode": 3, "atten_mask": TRIANGLE}
    alone = torch.cat([_alone(*lengths, index, **options)[0][0] for index in (0, 1)])
    assert torch.allclose(_tnd(*lengths, **options)[0], alone, atol=1e-6)
    full = _tnd(*lengths)[0]
    assert torch.equal(_tnd(*lengths, sparse_mode=3)[0], full), "without a mask the mode is ignored"
    assert torch.equal(_tnd(*lengths, sparse_mode=3, atten_mask=~TRIANGLE)[0], full)


def test_maximum_and_sum_have_one_shape_and_two_orders() -> None:
    lengths = [3, 4], [2, 6]
    plain, asked = _tnd(*lengths), _tnd(*lengths, softmax_layout="TND")
    assert plain[1].shape == asked[1].shape == (7, 2, 8)
    assert not torch.equal(plain[1], asked[1])
    alone = [_alone(*lengths, index)[1][0] for index in (0, 1)]
    assert torch.allclose(asked[1], torch.cat([one.transpose(0, 1) for one in alone]))
    assert torch.allclose(plain[1].flatten(), torch.cat([one.flatten() for one in alone]))


@pytest.mark.parametrize("lengths", [([3, 2], [4, 0]), ([3, 0], [4, 2])])
def test_sequence_with_one_side_empty_spoils_the_call(lengths: tuple[list[int], list[int]]) -> None:
    out, largest, total, *_ = _tnd(*lengths)
    assert out.isnan().all()
    assert (largest + total.log()).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"actual_seq_qlen": torch.tensor([3, 7])}, TypeError, "lists of int"),
        ({"actual_seq_qlen": None}, TypeError, "lists of int"),
        ({"actual_seq_qlen": [0, 3, 7]}, RuntimeError, "one length"),
        ({"actual_seq_qlen": [3, 6]}, RuntimeError, "T = 7"),
        ({"actual_seq_kvlen": [5, 4]}, RuntimeError, "T = 8"),
        ({"actual_seq_qlen": [0] * 1024 + [7]}, RuntimeError, "1024"),
        ({"atten_mask": torch.zeros(4, 6, dtype=torch.bool)}, NotImplementedError, "2 and 3"),
        ({"atten_mask": TRIANGLE[:4, :6], "sparse_mode": 2}, RuntimeError, "2048"),
        ({"softmax_layout": "NTD"}, RuntimeError, "softmax_layout"),
    ],
)
def test_refusals_of_layout_tnd(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _tnd([3, 4], [2, 6], **change)
