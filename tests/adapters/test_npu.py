"""What the adapter of torch_npu decides on supposed machines, and what laws can't see of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.adapters import npu
from anyattn.environment import Environment, preset
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec, Storage

NPU = preset("npu", packages={"torch-npu": "2.9.0"})


def _spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "npu", 0.125, 0).replace(**changes)


def _codes(spec: AttentionSpec, env: Environment = NPU) -> list[str]:
    return [reason.code for reason in anyattn.explain(spec, env=env, backend="npu").reasons("npu")]


def test_npu_with_torch_npu_takes_the_call() -> None:
    assert anyattn.explain(_spec(), env=NPU, backend="npu").chosen == "npu"
    assert npu.Npu().origin(NPU) == "torch-npu 2.9.0"


def test_absent_package_is_refused_with_the_command_that_installs_it() -> None:
    (reason,) = anyattn.explain(_spec(), env=preset("npu"), backend="npu").reasons("npu")
    assert reason.code == "not_installed"
    assert "pip install torch_npu" in reason.hint


def test_other_device_is_refused() -> None:
    assert "no_device" in _codes(_spec(device_type="cuda"), preset("h100", packages={"torch-npu": "2.9.0"}))


BIAS = MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (1, 1, 64, 64)))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"mask": BIAS}, "mask"),
        ({"dtype": torch.float64}, "dtype"),
        ({"head_dim": 776, "head_dim_v": 776}, "head_dim"),
        ({"head_dim_v": 32}, "head_dim_v"),
        ({"num_heads": 257, "num_kv_heads": 257}, "size"),
        ({"seqlen_kv": (1 << 20) + 1, "same_lengths": False}, "size"),
        ({"dropout_p": 1.0}, "dropout"),
        ({"softcap": 3.0}, "softcap"),
        ({"scale": 0.0}, "scale"),
        ({"deterministic": True, "requires_grad": ("query",)}, "deterministic"),
    ],
)
def test_what_the_kernel_lacks_is_refused(changes: dict[str, Any], code: str) -> None:
    assert code in _codes(_spec(**changes))


def test_256_heads_and_768_dims_are_taken() -> None:
    assert _codes(_spec(num_heads=256, num_kv_heads=64, head_dim=768, head_dim_v=768, dropout_p=0.5)) == []


def test_window_becomes_a_dense_mask_and_is_told() -> None:
    call = _spec(mask=MaskSpec(PatternSpec(3, 3, "upper_left")))
    lowering = npu.Npu().lower(call, NPU)
    assert lowering.dense
    assert [conversion.code for conversion in lowering.conversions] == ["dense_mask"]


def test_odd_storage_is_copied() -> None:
    assert npu.Npu().lower(_spec(storage=Storage(unit_stride=False)), NPU).copy
    assert not npu.Npu().lower(_spec(), NPU).copy


class _Told:
    """Stands for the kernel, and keeps what it was told."""

    def __init__(self, function: Any) -> None:
        self.function, self.options = function, {}

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.given, self.options = given, options
        return self.function(*given, **options)


def _told(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, mask: Any = None, **options: Any) -> _Told:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 16) for length in (rows, keys, keys))
    with doubles.installed("npu"):
        anyattn.attention(q, k, v, backend="npu")
        kernel = _Told(FUNCTIONS["npu"].npu_fusion_attention)
        monkeypatch.setattr(FUNCTIONS["npu"], "npu_fusion_attention", kernel)
        out = anyattn.attention(q, k, v, mask, backend="npu", **options)
    if not options.get("dropout_p"):
        truth, _ = reference.attention(q, k, v, mask, scale=options.get("scale"))
        assert torch.allclose(out.double(), truth, atol=1e-5)
    return kernel


@pytest.mark.parametrize(("align", "mode"), [("upper_left", 2), ("lower_right", 3)])
def test_causal_modes_go_with_the_compressed_mask(monkeypatch: pytest.MonkeyPatch, align: Any, mode: int) -> None:
    told = _told(monkeypatch, 4, 6, masks.Causal(align)).options
    assert told["sparse_mode"] == mode
    assert torch.equal(told["atten_mask"], torch.ones(2048, 2048, dtype=torch.bool).triu(1))


def test_rows_that_causal_leaves_without_a_key_never_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _told(monkeypatch, 9, 4, masks.Causal("lower_right"))
    assert kernel.given[0].shape[1] == kernel.given[1].shape[1] == 4


def test_scale_and_keep_probability_are_always_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = _told(monkeypatch, 4, 4, dropout_p=0.25).options
    assert (told["scale"], told["keep_prob"]) == (0.25, 0.75)
    assert _told(monkeypatch, 4, 4, scale=0.5).options["scale"] == 0.5


def test_mask_is_inverted_and_given_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = torch.tensor([[True, True, False], [True, False, True]])
    told = _told(monkeypatch, 4, 3, masks.KeyPadding(allowed)).options["atten_mask"]
    assert told.shape == (2, 1, 4, 3)
    assert torch.equal(told, ~allowed[:, None, None, :].expand(2, 1, 4, 3))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((4, 3), (1, 1, 4, 3)),
        ((1, 2, 4, 3), (2, 2, 4, 3)),
        ((2, 1, 4, 3), (2, 1, 4, 3)),
        ((2, 2, 1, 3), (2, 2, 4, 3)),
    ],
)
def test_dense_mask_has_a_shape_that_the_kernel_takes(
    monkeypatch: pytest.MonkeyPatch, given: tuple[int, ...], told: tuple[int, ...]
) -> None:
    allowed = torch.rand(given) < 0.6
    allowed[..., 1] = True
    assert _told(monkeypatch, 4, 3, masks.Boolean(allowed)).options["atten_mask"].shape == told


def test_reach_and_bias_are_left_as_they_are_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    told = _told(monkeypatch, 4, 6, masks.SlidingWindow(1, 1)).options
    assert not {"pre_tockens", "next_tockens", "pse"} & set(told)


def test_rows_without_a_key_are_opened_and_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = torch.ones(4, 3, dtype=torch.bool)
    allowed[2] = False
    told = _told(monkeypatch, 4, 3, masks.Boolean(allowed)).options
    assert told["inner_precise"] == 2
    assert not told["atten_mask"].any()
    everywhere = _told(monkeypatch, 4, 3, masks.SlidingWindow(1, 1, "lower_right")).options
    assert "inner_precise" not in everywhere


def test_lse_is_made_of_the_first_of_eight_and_minus_infinity_without_a_key() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    mask = masks.Boolean(torch.tensor([[True] * 4, [False] * 4, [True, False, False, True], [True] * 4]))
    with doubles.installed("npu"):
        _, lse = anyattn.attention(q, k, v, mask, backend="npu", return_lse=True)
    assert lse.shape == (1, 2, 4)
    assert torch.allclose(lse.double(), reference.attention(q, k, v, mask)[1], atol=1e-5)
    assert bool((lse[:, :, 1] == float("-inf")).all())


def _packed(**changes: Any) -> AttentionSpec:
    return _spec(**({"packed": True, "same_lengths": False} | changes))


UPPER = MaskSpec(PatternSpec(-1, 0, "upper_left"))
LOWER = MaskSpec(PatternSpec(-1, 0, "lower_right"))


@pytest.mark.parametrize(
    ("changes", "packs"),
    [
        ({}, True),
        ({"dtype": torch.float32, "dropout_p": 0.5, "requires_grad": ("query",)}, True),
        ({"num_kv_heads": 2, "batch": 1024}, True),
        ({"mask": UPPER, "same_lengths": True}, True),
        ({"mask": LOWER, "same_lengths": True}, True),
        # A row without a key, a window, too many sequences or tokens.
        ({"mask": UPPER}, False),
        ({"mask": LOWER}, False),
        ({"mask": MaskSpec(PatternSpec(3, 0, "upper_left")), "same_lengths": True}, False),
        ({"batch": 1025}, False),
        ({"batch": 17, "seqlen_kv": 1 << 16}, False),
        # Maximum and sum come in an order that their shape doesn't tell.
        ({"return_lse": True}, False),
        ({"sinks": True}, False),
    ],
)
def test_packed_sequences_are_given_as_they_are_or_padded(changes: dict[str, Any], packs: bool) -> None:
    decision = anyattn.explain(_packed(**changes), env=NPU, backend="npu")
    assert decision.chosen == "npu"
    codes = {conversion.code for conversion in decision.conversions}
    assert ("host_lengths" in codes) == packs
    assert ("unpacked" in codes) != packs


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Told]:
    torch.manual_seed(0)
    with doubles.installed("npu"):
        anyattn.attention(*(torch.randn(1, 3, 2, 16) for _ in range(3)), backend="npu")
        kernel = _Told(FUNCTIONS["npu"].npu_fusion_attention)
        monkeypatch.setattr(FUNCTIONS["npu"], "npu_fusion_attention", kernel)
        yield kernel


def _starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _tokens(total: int, heads: int = 4) -> torch.Tensor:
    return torch.randn(total, heads, 16)


def test_packed_sequences_are_told_as_ends_in_lists(told: _Told) -> None:
    q, k, v = _tokens(7), _tokens(8, 2), _tokens(8, 2)
    out = anyattn.attention_varlen(
        q, k, v, _starts(3, 0, 4), _starts(2, 0, 6), 4, 6, enable_gqa=True, scale=0.5, backend="npu"
    )
    assert told.given[3:] == (4, "TND")
    assert told.options == {"scale": 0.5, "keep_prob": 1.0, "actual_seq_qlen": [3, 7], "actual_seq_kvlen": [2, 8]}
    for rows, keys in ((slice(3), slice(2)), (slice(3, 7), slice(2, 8))):
        truth, _ = reference.attention(q[None, rows], k[None, keys], v[None, keys], scale=0.5)
        assert torch.allclose(out[rows].double(), truth[0], atol=1e-5)


@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
def test_packed_causal_goes_with_the_compressed_mask(told: _Told, align: Any) -> None:
    q, k, v, starts = _tokens(7), _tokens(7), _tokens(7), _starts(3, 4)
    out = anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, masks.Causal(align), backend="npu")
    assert told.options["sparse_mode"] == 2, "of the same lengths both alignments are one"
    assert told.options["atten_mask"].shape == (2048, 2048)
    for rows in (slice(3), slice(3, 7)):
        truth, _ = reference.attention(q[None, rows], k[None, rows], v[None, rows], masks.Causal())
        assert torch.allclose(out[rows].double(), truth[0], atol=1e-5)


def test_sequences_with_one_side_empty_never_reach_the_kernel(told: _Told) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in (_tokens(9), _tokens(8), _tokens(8)))
    out = anyattn.attention_varlen(q, k, v, _starts(3, 0, 2, 4), _starts(2, 5, 0, 1), 4, 5, backend="npu")
    assert (told.options["actual_seq_qlen"], told.options["actual_seq_kvlen"]) == ([3, 7], [2, 3])
    out.square().sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert not out[3:5].any()
    assert not q.grad[3:5].any()
    assert not k.grad[2:7].any()
    assert bool(q.grad.isfinite().all() and k.grad.isfinite().all() and q.grad[:3].any())


def test_lse_and_sinks_of_packed_sequences_come_of_padded_ones(told: _Told) -> None:
    q, k, v, starts = _tokens(7), _tokens(7), _tokens(7), _starts(3, 4)
    out, lse = anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, return_lse=True, backend="npu")
    assert told.given[4] == "BSND"
    assert lse.shape == (4, 7)
    for rows in (slice(3), slice(3, 7)):
        truth, true_lse = reference.attention(q[None, rows], k[None, rows], v[None, rows])
        assert torch.allclose(out[rows].double(), truth[0], atol=1e-5)
        assert torch.allclose(lse[:, rows].double(), true_lse[0], atol=1e-5)
