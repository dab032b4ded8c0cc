"""What the adapter of xformers decides on supposed machines, and what laws can't see of it."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F

import anyattn
import doubles
from anyattn import masks
from anyattn.backend.patterns import KernelPattern
from anyattn.backend.protocol import Lowering
from anyattn.environment import Environment, preset
from anyattn.errors import BackendUnavailableError
from anyattn.lowering import cache
from anyattn.masks.objects import Mask
from anyattn.selection import registry
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.decision import Decision
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec, Storage
from doubles.double import module
from doubles.kernels import xformers as xf

OPS = ("xformers.ops",)
DENSE = MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (1, 1, 64, 64)))
UPPER = MaskSpec(PatternSpec(-1, 0, "upper_left"))
LOWER = MaskSpec(PatternSpec(-1, 0, "lower_right"))
WINDOW = MaskSpec(PatternSpec(3, 2, "lower_right"))


def _machine(name: str = "h100", version: str = "0.0.35", modules: tuple[str, ...] = OPS, **others: str) -> Environment:
    packages = {"xformers": version, **{key.replace("_", "-"): value for key, value in others.items()}}
    return dataclasses.replace(preset(name, packages=packages), modules=frozenset(modules))


def _spec(**changes: object) -> AttentionSpec:
    spec = AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0)
    return spec.replace(**changes)


def _explain(spec: AttentionSpec, env: Environment) -> Decision:
    return anyattn.explain(spec, env=env, backend="xformers")


def _codes(spec: AttentionSpec, env: Environment) -> set[str]:
    return {reason.code for reason in _explain(spec, env).reasons("xformers")}


def _lowered(spec: AttentionSpec) -> Lowering:
    backend = registry.get("xformers")
    assert backend is not None
    return backend.lower(spec, _machine())


def _conversions(spec: AttentionSpec) -> set[str]:
    return {conversion.code for conversion in _lowered(spec).conversions}


@pytest.mark.parametrize("name", ["a100", "rtx3090", "rtx4090", "h100", "b200", "rtx5090"])
def test_installed_package_takes_a_plain_call(name: str) -> None:
    assert _explain(_spec(), _machine(name)).chosen == "xformers"


@pytest.mark.parametrize("name", ["t4", "mi300"])
def test_older_and_other_gpus_are_refused(name: str) -> None:
    assert "arch" in _codes(_spec(), _machine(name))


@pytest.mark.parametrize(
    ("env", "code", "says"),
    [
        (preset("h100"), "not_installed", "pip install"),
        (_machine(version="0.0.28.post3"), "wrong_version", "pip install"),
        (_machine(modules=()), "not_installed", "xformers.ops"),
        (_machine(version="0.0.36.dev1280"), "not_installed", "mslk"),
        (_machine(flash_attn_4="4.0.0b36"), "broken_import", "flash-attn-4"),
    ],
)
def test_package_that_cannot_serve_is_refused_with_its_cause(env: Environment, code: str, says: str) -> None:
    reasons = _explain(_spec(), env).reasons("xformers")
    assert reasons[0].code == code
    assert says in str(reasons[0])


@pytest.mark.parametrize(
    "env",
    [
        _machine(version="0.0.36.dev1280", modules=("xformers.ops", "mslk")),
        _machine(version="0.0.35+cu130"),
        # Only from 0.0.31 on does a namespace flash_attn stop the import.
        _machine(version="0.0.29.post3", flash_attn_4="4.0.0b36"),
        _machine(modules=(*OPS, "flash_attn.flash_attn_interface"), flash_attn="2.8.3", flash_attn_4="4.0.0b36"),
    ],
)
def test_package_that_can_serve_is_taken(env: Environment) -> None:
    assert _explain(_spec(), env).chosen == "xformers"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"dtype": torch.float64}, "dtype"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim"),
        ({"softcap": 1.0}, "softcap"),
        ({"batch": 65536}, "size"),
        ({"deterministic": True, "requires_grad": ("query",)}, "deterministic"),
        ({"mask": DENSE, "requires_grad": ("mask",)}, "mask_grad"),
        ({"mask": MaskSpec(dense=DenseSpec("bias", torch.float32, (1, 1, 64, 64)))}, "mask_dtype"),
        ({"return_lse": True, "dropout_p": 0.5}, "lse"),
        ({"dropout_p": 1.0}, "dropout"),
    ],
)
def test_call_that_is_wrong_or_fatal_is_refused(changes: dict[str, object], code: str) -> None:
    assert _codes(_spec(**changes), _machine()) == {code}


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": DENSE},
        {"mask": MaskSpec(key="padding")},
        {"dtype": torch.float32},
        {"head_dim_v": 32},
        {"mask": UPPER, "seqlen_kv": 32, "same_lengths": False},
        {"mask": WINDOW, "dtype": torch.float32},
    ],
)
def test_call_for_cutlass_is_refused_after_hopper(changes: dict[str, object]) -> None:
    spec = _spec(**changes)
    assert _lowered(spec).entry == "cutlass"
    assert not _codes(spec, _machine("h100"))
    reasons = _explain(spec, _machine("b200")).reasons("xformers")
    assert [reason.code for reason in reasons] == ["arch"]
    assert "CUTLASS" in reasons[0].need


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": UPPER},
        {"mask": LOWER, "seqlen_kv": 32, "same_lengths": False},
        {"mask": UPPER, "seqlen_kv": 128, "same_lengths": False},
        {"mask": WINDOW},
        {"head_dim": 44, "head_dim_v": 48},
        {"num_kv_heads": 2},
        {"requires_grad": ("query",), "return_lse": True},
    ],
)
def test_call_for_flash_is_taken_after_hopper(changes: dict[str, object]) -> None:
    spec = _spec(**changes)
    assert _lowered(spec).entry == "flash"
    assert not _codes(spec, _machine("b200"))


def test_wide_heads_with_dropout_and_gradients_need_a_data_center_gpu() -> None:
    spec = _spec(head_dim=256, head_dim_v=256, dropout_p=0.1, requires_grad=("query",))
    assert _codes(spec, _machine("rtx4090")) == {"dropout"}
    assert not _codes(spec, _machine("h100"))
    assert not _codes(spec.replace(requires_grad=()), _machine("rtx4090"))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"storage": Storage(aligned=False)}, "copy"),
        ({"storage": Storage(unit_stride=False)}, "copy"),
        ({"storage": Storage(expanded_kv=True), "dtype": torch.float32}, "copy"),
        ({"head_dim": 44, "head_dim_v": 44}, "pad_head_dim"),
        ({"num_kv_heads": 2, "requires_grad": ("key",)}, "repeat_heads"),
        ({"num_kv_heads": 2, "dtype": torch.float32}, "repeat_heads"),
        ({"return_lse": True, "requires_grad": ("key",)}, "second_forward"),
        ({"mask": MaskSpec(dense=DenseSpec("boolean", torch.bool, (1, 1, 64, 64)))}, "additive_mask"),
        ({"mask": MaskSpec(key="padding")}, "dense_mask"),
        ({"mask": UPPER, "seqlen_kv": 128, "same_lengths": False}, "realigned"),
    ],
)
def test_conversion_is_recorded(changes: dict[str, object], code: str) -> None:
    assert code in _conversions(_spec(**changes))


def test_plain_and_grouped_calls_are_not_converted() -> None:
    assert not _conversions(_spec())
    assert not _conversions(_spec(num_kv_heads=2))
    assert not _conversions(_spec(storage=Storage(expanded_kv=True)))


def test_right_side_that_flash_misreads_becomes_a_dense_mask() -> None:
    wide = _spec(mask=MaskSpec(PatternSpec(5, 40, "lower_right")), seqlen_kv=32, same_lengths=False)
    assert "dense_mask" in _conversions(wide.replace(seqlen_q=96))
    assert "dense_mask" not in _conversions(wide.replace(mask=MaskSpec(PatternSpec(5, 20, "lower_right"))))


def test_rows_before_the_first_key_never_reach_the_kernel() -> None:
    pattern = _lowered(_spec(mask=LOWER, seqlen_kv=24, same_lengths=False)).pattern
    assert pattern is not None
    assert pattern.rows == (40, 64)


def test_right_side_may_become_causal_on_the_rows_that_see_a_key() -> None:
    mask = MaskSpec(PatternSpec(-1, 40, "lower_right"))
    lowering = _lowered(_spec(mask=mask, seqlen_q=96, seqlen_kv=32, same_lengths=False))
    assert lowering.pattern == KernelPattern(-1, 0, "upper_left", rows=(24, 96))
    assert lowering.entry == "cutlass"


def _qkv(heads: int = 4, kv_heads: int = 4, seqlen: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (2, seqlen, kv_heads, 16)
    return torch.randn(2, seqlen, heads, 16).bfloat16(), torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()


def test_grouped_call_without_grad_mode_is_made_though_tensors_require_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(kv_heads=2))
    with doubles.installed("xformers"), torch.no_grad():
        out = anyattn.attention(q, k, v, enable_gqa=True, backend="xformers")
    expected, _ = anyattn.reference.attention(q, k, v)
    assert torch.allclose(out.double(), expected, atol=2e-2)


def test_queries_expanded_along_heads_keep_their_heads() -> None:
    q, k, v = _qkv(heads=1, kv_heads=2)
    q = q.expand(-1, -1, 4, -1)
    with doubles.installed("xformers"):
        out = anyattn.attention(q, k, v, enable_gqa=True, backend="xformers")
    expected, _ = anyattn.reference.attention(q, k, v)
    assert torch.allclose(out.double(), expected, atol=2e-2)


def test_keys_expanded_along_heads_are_copied_for_cutlass() -> None:
    q, k, v = (t.float() for t in _qkv(kv_heads=1, seqlen=65))
    k, v = k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1)
    with doubles.installed("xformers"):
        out = anyattn.attention(q, k, v, backend="xformers")
    assert torch.allclose(out.double(), anyattn.reference.attention(q, k, v)[0], atol=1e-5)


def test_bias_of_one_query_with_odd_strides_is_laid_out_anew() -> None:
    q, k, v = _qkv(seqlen=13)
    bias = torch.randn(1, 4, 1, 13).bfloat16()
    with doubles.installed("xformers"):
        out = anyattn.attention(q[:, :1], k, v, bias, backend="xformers")
    expected, _ = anyattn.reference.attention(q[:, :1], k, v, Mask(dense=bias))
    assert torch.allclose(out.double(), expected, atol=2e-2)


def _without_calls(modules: Mapping[str, types.ModuleType]) -> dict[str, types.ModuleType]:
    """Give xformers as it is from 0.0.36 on: without attention of its own."""
    ops = module("xformers.ops")
    return {"xformers": module("xformers", __version__="0.0.36", ops=ops), "xformers.ops": ops, **modules}


def _moved(modules: Mapping[str, types.ModuleType]) -> doubles.Double:
    found = frozenset((*OPS, "mslk"))
    return doubles.Double("xformers", {"xformers": "0.0.36"}, lambda: _without_calls(modules), found)


def test_attention_is_found_where_it_moved_to() -> None:
    inner = {"mslk": module("mslk"), "mslk.attention": module("mslk.attention"), **xf.fmha("mslk.attention.fmha")}
    q, k, v = _qkv()
    with doubles.installed("xformers", _moved(inner)):
        assert anyattn.attention(q, k, v, backend="xformers").shape == q.shape
    assert "mslk" not in sys.modules


def test_attention_that_is_nowhere_is_an_error_that_names_the_place() -> None:
    q, k, v = _qkv()
    with (
        doubles.installed("xformers", _moved({"mslk": module("mslk")})),
        pytest.raises(BackendUnavailableError, match=r"mslk\.attention"),
    ):
        anyattn.attention(q, k, v, backend="xformers")


def test_package_without_its_flash_operator_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xf.FlashFwOp, "is_available", classmethod(lambda cls: False))
    q, k, v = _qkv()
    with doubles.installed("xformers"), pytest.raises(BackendUnavailableError, match="flash operator"):
        anyattn.attention(q, k, v, backend="xformers")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ImportError("Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.6.3."), "supports some versions"),
        (AttributeError("module 'flash_attn' has no attribute 'flash_attn_interface'"), "supports some versions"),
        (ImportError("libcudart.so.13: cannot open shared object file"), "libcudart"),
    ],
)
def test_failing_import_is_reported_with_its_cause(
    error: Exception, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def failing(name: str, package: str | None = None) -> types.ModuleType:
        if name == "xformers.ops":
            raise error
        return real(name, package)

    q, k, v = _qkv()
    with doubles.installed("xformers"):
        monkeypatch.setattr(importlib, "import_module", failing)
        with pytest.raises(BackendUnavailableError, match=cause) as raised:
            anyattn.attention(q, k, v, backend="xformers")
    assert str(error) in str(raised.value)


PACKED = {"packed": True, "same_lengths": False}


@pytest.mark.parametrize(
    ("changes", "packs"),
    [
        ({}, True),
        ({"dropout_p": 0.1, "requires_grad": ("query",)}, True),
        ({"num_kv_heads": 2, "return_lse": True}, True),
        ({"head_dim": 44, "head_dim_v": 48}, True),
        ({"mask": MaskSpec(PatternSpec(-1, -1, "lower_right"))}, True),
        ({"mask": UPPER, "same_lengths": True}, True),
        ({"mask": LOWER, "same_lengths": True}, True),
        ({"mask": MaskSpec(PatternSpec(3, 0, "upper_left")), "same_lengths": True}, True),
        # One alignment alone, no right side, and nothing for CUTLASS, whose lse is another.
        ({"mask": UPPER}, False),
        ({"mask": LOWER}, False),
        ({"mask": MaskSpec(PatternSpec(3, 0, "lower_right"))}, False),
        ({"mask": WINDOW, "same_lengths": True}, False),
        ({"mask": MaskSpec(PatternSpec(3, -1, "upper_left")), "same_lengths": True}, False),
        ({"dtype": torch.float32}, False),
        ({"head_dim_v": 32}, False),
    ],
)
def test_packed_sequences_are_given_to_flash_or_padded(changes: dict[str, object], packs: bool) -> None:
    decision = _explain(_spec(**(PACKED | changes)), _machine())
    assert decision.chosen == "xformers"
    codes = {conversion.code for conversion in decision.conversions}
    assert ("host_lengths" in codes) == packs
    assert ("unpacked" in codes) != packs
    assert packs == (decision.kernel == "flash")


def test_packed_sequences_are_taken_after_hopper() -> None:
    spec = _spec(**(PACKED | {"mask": UPPER, "same_lengths": True}))
    assert not _codes(spec, _machine("b200"))
    assert _codes(spec.replace(dtype=torch.float32), _machine("b200")) == {"arch"}


class _Biases:
    """Stands for the kernel, and keeps the biases that it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[object] = []
        self.made = 0
        for name, honest in xf.CALLS.items():
            monkeypatch.setattr(FUNCTIONS["xformers"], name, self._spy(honest))
        kind = xf.BlockDiagonalMask
        make = kind.from_seqlens

        def counted(*lengths: list[int], device: torch.device) -> xf.BlockDiagonalMask:
            self.made += 1
            return make(*lengths, device=device)

        monkeypatch.setattr(kind, "from_seqlens", counted)

    def _spy(self, honest: Callable[..., object]) -> Callable[..., object]:
        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: object, *rest: object) -> object:
            self.given.append(bias)
            return honest(query, key, value, bias, *rest)

        return call


def _starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _tokens(total: int, heads: int = 4) -> torch.Tensor:
    return torch.randn(total, heads, 16).bfloat16()


@pytest.fixture
def biases(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Biases]:
    torch.manual_seed(0)
    cache.forget()
    with doubles.installed("xformers"):
        anyattn.attention(*_qkv(), backend="xformers")
        yield _Biases(monkeypatch)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (None, "BlockDiagonalMask"),
        (masks.Causal(), "BlockDiagonalCausalMask"),
        (masks.Causal("lower_right"), "BlockDiagonalCausalMask"),
        (masks.SlidingWindow(1, 0), "BlockDiagonalCausalLocalAttentionMask"),
        # It reaches every key.
        (masks.SlidingWindow(4, 0), "BlockDiagonalCausalMask"),
    ],
)
def test_pattern_of_packed_sequences_has_its_bias(biases: _Biases, mask: Mask | None, kind: str) -> None:
    starts = _starts(3, 0, 5)
    q, k, v = _tokens(8), _tokens(8), _tokens(8)
    found = anyattn.attention_varlen(q, k, v, starts, starts, 5, 5, mask, backend="xformers")
    (bias,) = biases.given
    assert type(bias).__name__ == kind
    assert isinstance(bias, xf.BlockDiagonalMask)
    assert bias.q_seqinfo is bias.k_seqinfo
    assert bias.q_seqinfo.seqstart_py == [0, 3, 8], "the sequence without anything is left out"
    for rows in (slice(0, 3), slice(3, 8)):
        truth, _ = anyattn.reference.attention(q[None, rows], k[None, rows], v[None, rows], mask)
        assert torch.allclose(found[rows].double(), truth[0], atol=2e-2)


def test_bias_is_copied_to_the_device_once_for_every_layer(biases: _Biases) -> None:
    starts_q, starts_k = _starts(3, 5), _starts(2, 4)
    for _ in range(3):
        anyattn.attention_varlen(_tokens(8), _tokens(6), _tokens(6), starts_q, starts_k, 5, 4, backend="xformers")
        anyattn.attention_varlen(_tokens(8), _tokens(8), _tokens(8), starts_q, starts_q, 5, 5, backend="xformers")
    assert biases.made == 2
    assert len(biases.given) == 6


def test_kept_bias_of_packed_sequences_does_not_keep_their_lengths_alive(biases: _Biases) -> None:
    starts = _starts(3, 5)
    anyattn.attention_varlen(_tokens(8), _tokens(8), _tokens(8), starts, starts, 5, 5, backend="xformers")
    gone = weakref.ref(starts)
    biases.given.clear()
    del starts
    assert gone() is None


def test_sequences_with_one_side_empty_never_reach_the_kernel(biases: _Biases) -> None:
    starts_q, starts_k = _starts(3, 0, 2, 4), _starts(2, 5, 0, 1)
    q, k, v = (tensor.requires_grad_() for tensor in (_tokens(9), _tokens(8), _tokens(8)))
    out = anyattn.attention_varlen(q, k, v, starts_q, starts_k, 4, 5, backend="xformers")
    (bias,) = biases.given
    assert isinstance(bias, xf.BlockDiagonalMask)
    assert bias.q_seqinfo.seqstart_py == [0, 3, 7]
    assert bias.k_seqinfo.seqstart_py == [0, 2, 3]
    out.float().square().sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert not out[3:5].any()
    assert not q.grad[3:5].any()
    assert not k.grad[2:7].any()
    assert k.grad[7:].isfinite().all()
    assert q.grad[:3].any()


def test_packed_groups_share_keys_without_gradients_and_are_repeated_with_them(biases: _Biases) -> None:
    starts = _starts(3, 5)
    q, k, v = _tokens(8), _tokens(8, 2), _tokens(8, 2)
    call = {"enable_gqa": True, "backend": "xformers"}
    plain, lse = anyattn.attention_varlen(q, k, v, starts, starts, 5, 5, return_lse=True, **call)
    assert lse.shape == (4, 8)
    with_grad = anyattn.attention_varlen(q.clone().requires_grad_(), k, v, starts, starts, 5, 5, **call)
    assert torch.equal(plain, with_grad)
    for rows in (slice(0, 3), slice(3, 8)):
        truth, true_lse = anyattn.reference.attention(q[None, rows], k[None, rows], v[None, rows])
        assert torch.allclose(plain[rows].double(), truth[0], atol=2e-2)
        assert torch.allclose(lse[:, rows].double(), true_lse[0], atol=1e-5)


def test_lse_that_an_old_flash_pads_per_sequence_is_packed(monkeypatch: pytest.MonkeyPatch, biases: _Biases) -> None:
    starts = _starts(3, 5)
    q, k, v = _tokens(8), _tokens(8), _tokens(8)
    call = {"return_lse": True, "backend": "xformers"}
    _, lse = anyattn.attention_varlen(q, k, v, starts, starts, 5, 5, **call)
    name = "memory_efficient_attention_forward_requires_grad"
    honest = xf.CALLS[name]

    def padding(*given: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, packed = honest(*given)
        return out, torch.stack([F.pad(packed[0, :, :3], (0, 2), value=7.0), packed[0, :, 3:]])

    monkeypatch.setattr(FUNCTIONS["xformers"], name, padding)
    assert torch.equal(anyattn.attention_varlen(q, k, v, starts, starts, 5, 5, **call)[1], lse)


def test_dropout_of_packed_sequences_is_told(biases: _Biases) -> None:
    starts = _starts(300, 200)
    q, k = torch.zeros(500, 4, 16).bfloat16(), torch.zeros(500, 4, 16).bfloat16()
    v = torch.ones(500, 4, 16).bfloat16()
    out = anyattn.attention_varlen(q, k, v, starts, starts, 300, 300, dropout_p=0.5, backend="xformers")
    assert biases.given
    assert abs(float(out.float().mean()) - 1) < 0.05
    assert float(out.float().std()) > 0.01
