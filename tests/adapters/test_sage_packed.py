"""Packed sequences and key masks on SageAttention: what is said of them, and that the double is given no trap."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.adapters.sage import packed
from anyattn.environment import Device, Environment, preset
from anyattn.masks.objects import Mask
from anyattn.reference import tolerance
from anyattn.selection.registry import get
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec, Storage

PACKS = ("sage", "sage_int8_fp16_triton")
OTHERS = ("sage_int8_fp16", "sage_int8_fp8", "sage_int8_fp8_sm90", "sage_hub")
CAUSAL = MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"))
LOWER_RIGHT = MaskSpec(pattern=PatternSpec(-1, 0, "lower_right"))
PADDING = MaskSpec(key="padding", dead_rows=True)
LENGTHS = MaskSpec(key="lengths", dead_rows=True, prefix=True)


def _machine(arch: tuple[int, int] = (9, 0)) -> Environment:
    env = preset("h100", packages={"sageattention": "2.2.0", "kernels": "0.17.2"})
    devices = (Device("cpu"), Device("cuda", "a supposed GPU", arch))
    return dataclasses.replace(env, modules=frozenset(("sageattention", "kernels")), devices=devices)


def _spec(**changes: object) -> AttentionSpec:
    spec = AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0)
    return spec.replace(**changes)


def _reasons(backend: str, spec: AttentionSpec, arch: tuple[int, int] = (9, 0)) -> dict[str, anyattn.Reason]:
    found = anyattn.explain(spec, env=_machine(arch), backend=backend)
    return {reason.code: reason for reason in found.reasons(backend)}


@pytest.mark.parametrize("backend", PACKS)
@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"packed": True}, ["synchronises"]),
        ({"packed": True, "mask": CAUSAL, "same_lengths": False}, ["synchronises"]),
        ({"packed": True, "mask": LOWER_RIGHT}, ["synchronises"]),
        ({"packed": True, "storage": Storage(unit_stride=False)}, ["copy", "synchronises"]),
        ({"packed": True, "num_kv_heads": 1}, ["synchronises"]),
        ({"mask": PADDING}, ["keys_packed", "synchronises"]),
        ({"mask": LENGTHS, "seqlen_kv": 99, "same_lengths": False}, ["keys_packed", "synchronises"]),
    ],
)
def test_decision_says_what_is_done_and_that_it_waits(
    backend: str, changes: dict[str, object], codes: list[str]
) -> None:
    decision = anyattn.explain(_spec(**changes), env=_machine(), backend=backend)
    assert decision.chosen == backend
    assert decision.kernel == "sageattn_varlen"
    assert [conversion.code for conversion in decision.conversions] == codes


@pytest.mark.parametrize("backend", PACKS)
@pytest.mark.parametrize("how", [{"packed": True}, {"mask": PADDING}, {"mask": LENGTHS}])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"return_lse": True}, "lse"),
        ({"sinks": True}, "sinks"),
        ({"requires_grad": ("value",)}, "backward"),
        ({"head_dim": 136, "head_dim_v": 136}, "head_dim"),
        ({"head_dim_v": 32}, "head_dim_v"),
        ({"scale": -1.0}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"softcap": 5.0}, "softcap"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"dtype": torch.float32}, "dtype"),
        ({"batch": 65535, "seqlen_q": 1, "seqlen_kv": 1}, "size"),
        ({"batch": 64, "seqlen_q": 1 << 17, "same_lengths": False}, "size"),
    ],
)
def test_calls_that_it_has_no_way_to_say_are_refused(
    backend: str, how: dict[str, object], changes: dict[str, object], code: str
) -> None:
    assert set(_reasons(backend, _spec(**how, **changes))) == {code}


@pytest.mark.parametrize("backend", PACKS)
@pytest.mark.parametrize(
    "changes",
    [
        {"mask": dataclasses.replace(PADDING, pattern=CAUSAL.pattern)},
        {"mask": dataclasses.replace(LENGTHS, pattern=LOWER_RIGHT.pattern)},
        {"mask": dataclasses.replace(PADDING, dense=DenseSpec("boolean", torch.bool, (1, 1, 64, 64)))},
        {"packed": True, "mask": LOWER_RIGHT, "same_lengths": False},
        {"packed": True, "mask": MaskSpec(pattern=PatternSpec(3, 0, "upper_left"))},
    ],
)
def test_patterns_that_move_with_the_keys_and_windows_are_refused(backend: str, changes: dict[str, object]) -> None:
    assert set(_reasons(backend, _spec(**changes))) == {"mask"}


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("changes", [{"packed": True}, {"mask": PADDING}, {"mask": LENGTHS}])
def test_other_kernels_promise_none_of_it(backend: str, changes: dict[str, object]) -> None:
    assert set(_reasons(backend, _spec(**changes))) == {"mask"}
    declared = get(backend).declarations["cuda"]  # type: ignore[union-attr]
    assert not declared.varlen
    assert not declared.key_mask


@pytest.mark.parametrize("changes", [{"packed": True}, {"mask": PADDING}])
@pytest.mark.parametrize(
    ("arch", "taken"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 3), True),
        ((11, 0), False),
        ((12, 0), False),
        ((12, 1), False),
    ],
)
def test_it_runs_on_the_archs_of_the_triton_kernel(
    changes: dict[str, object], arch: tuple[int, int], taken: bool
) -> None:
    for backend in PACKS:
        reasons = _reasons(backend, _spec(**changes), arch)
        assert set(reasons) == (set() if taken else {"arch"})
        assert taken or reasons["arch"].need == "sm80 to sm103"


@pytest.mark.parametrize("changes", [{"packed": True}, {"mask": PADDING}])
def test_declaration_is_that_of_the_function_that_is_called(changes: dict[str, object]) -> None:
    for backend in PACKS:
        caps = get(backend).capabilities(_spec(**changes), _machine())  # type: ignore[union-attr]
        assert caps is not None
        assert (caps.quantised, caps.value_max, caps.lse) == ("int8", 1023.5, False)
    with anyattn.attention_backend(["sage", "native"], precision="int8"):
        assert anyattn.explain(_spec(**changes), env=_machine()).chosen == "sage"
        assert anyattn.explain(_spec(), env=_machine()).chosen == "native", "sageattn computes in fp8 there"


@pytest.fixture(params=PACKS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with doubles.installed(request.param):
        yield request.param


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _assert_right(out: Tensor, truth: Tensor, plain: Tensor) -> None:
    assert out.dtype == plain.dtype
    allowed = 2 * tolerance.budget(truth, plain, out.dtype, over=(0, 2))
    assert tolerance.excess(out, truth, allowed) <= 1


def _alone(tensors: list[Tensor], lengths: tuple[tuple[int, ...], ...], mask: Mask | None, dtype: Any) -> Tensor:
    q, k, v = tensors
    found, row, key = [], 0, 0
    for rows, keys in zip(*lengths, strict=True):
        part = (q[None, row : row + rows], k[None, key : key + keys], v[None, key : key + keys])
        found.append(reference.attention(*part, mask, dtype=dtype)[0][0])
        row, key = row + rows, key + keys
    return torch.cat(found)


def _varlen(
    backend: str, tensors: list[Tensor], lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], **options: Any
) -> Tensor:
    starts = _starts(lengths_q), _starts(lengths_k)
    options.setdefault("enable_gqa", True)
    out: Tensor = anyattn.attention_varlen(
        *tensors, *starts, max(lengths_q), max(lengths_k), backend=backend, **options
    )
    return out


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one": ((5,), (7,)),
    "empty here and there": ((0, 3, 0, 5, 1, 0), (3, 4, 0, 0, 3, 2)),
    "one key": ((300, 2), (1, 1)),
    "equal": ((50, 200, 130), (50, 200, 130)),
    "more queries": ((300, 70, 129), (100, 70, 3)),
    "more queries at the end": ((40, 300), (40, 10)),
    "more keys": ((1, 100, 20), (70, 300, 20)),
    "all empty but one": ((0, 4, 3), (5, 4, 0)),
    "no pair": ((0, 4), (5, 0)),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_sequence_is_by_itself(backend: str, shape: str, causal: bool, kv_heads: int) -> None:
    lengths = SHAPES[shape]
    rows, keys = (sum(part) for part in lengths)
    tensors = _random((rows, 4, 64), (keys, kv_heads, 64), (keys, kv_heads, 64))
    out = _varlen(backend, tensors, *lengths, is_causal=causal)
    mask = masks.Causal() if causal else None
    truth, plain = (_alone(tensors, lengths, mask, dtype) for dtype in (torch.float64, torch.bfloat16))
    _assert_right(out, truth, plain)


@pytest.mark.parametrize("dim", [16, 40, 64, 72, 128])
def test_head_dims_are_all_taken(backend: str, dim: int) -> None:
    lengths = (3, 130), (70, 5)
    tensors = _random((133, 2, dim), (75, 2, dim), (75, 2, dim), dtype=torch.float16)
    out = _varlen(backend, tensors, *lengths, is_causal=True)
    truth, plain = (_alone(tensors, lengths, masks.Causal(), dtype) for dtype in (torch.float64, torch.float16))
    _assert_right(out, truth, plain)


def test_causal_rows_after_the_last_key_see_every_key(backend: str) -> None:
    q, k, v = _random((9, 2, 64), (4, 2, 64), (4, 2, 64))
    out = _varlen(backend, [q, k, v], (9,), (4,), is_causal=True)
    assert torch.equal(out[4:], _varlen(backend, [q[4:], k, v], (5,), (4,)))


def test_lengths_beyond_the_longest_are_harmless(backend: str) -> None:
    tensors, starts = _random((7, 2, 64), (7, 2, 64), (7, 2, 64)), _starts((3, 4))
    found = anyattn.attention_varlen(*tensors, starts, starts, 999, 999, backend=backend)
    assert torch.equal(found, _varlen(backend, tensors, (3, 4), (3, 4)))


def test_nothing_is_left_to_swallowed_keywords(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _random((7, 2, 64), (7, 2, 64), (7, 2, 64))
    _varlen(backend, tensors, (3, 4), (2, 5))
    seen: list[dict[str, Any]] = []
    right = FUNCTIONS[backend].varlen

    def watched(*tensors: Tensor, **options: Any) -> Any:
        seen.append(options)
        return right(*tensors, **options)

    monkeypatch.setattr(FUNCTIONS[backend], "varlen", watched)
    _varlen(backend, tensors, (3, 4), (2, 5), scale=0.3)
    (options,) = seen
    assert set(options) == set(packed.PARAMETERS)
    assert (options["sm_scale"], options["is_causal"]) == (0.3, False)
    assert (options["max_seqlen_q"], options["max_seqlen_k"]) == (4, 5)
    assert options["cu_seqlens_q"].tolist() == [0, 3, 7]
    assert options["cu_seqlens_k"].dtype == torch.int32


MASKS: dict[str, Tensor] = {
    "left": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]),
    "scattered": torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]]),
    "all": torch.ones(2, 6),
    "an entry without keys": torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]]),
    "the last entry without keys": torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]),
    "no key at all": torch.zeros(2, 6),
}


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("given", ["padding", "tensor"])
@pytest.mark.parametrize("kind", MASKS)
def test_key_masks_are_packed(backend: str, kind: str, given: str, layout: str) -> None:
    q, k, v = _random((2, 5, 4, 64), (2, 6, 2, 64), (2, 6, 2, 64))
    allowed = MASKS[kind].bool()
    truth, plain = (
        reference.attention(q, k, v, masks.KeyPadding(allowed), dtype=dtype)[0]
        for dtype in (torch.float64, torch.bfloat16)
    )
    for tensor in (k, v):
        tensor[~allowed] = torch.nan  # it subtracts the mean of what it is given
    mask = masks.KeyPadding(allowed) if given == "padding" else allowed[:, None, None]
    if layout == "BSHD":
        out = anyattn.attention(q, k, v, mask, enable_gqa=True, backend=backend)
    else:
        turned = (tensor.transpose(1, 2) for tensor in (q, k, v))
        found = anyattn.scaled_dot_product_attention(*turned, mask, enable_gqa=True, backend=backend)
        out = found.transpose(1, 2)
    assert not out[~allowed.any(-1)].any(), "rows without a key give zeros"
    _assert_right(out.flatten(0, 1), truth.flatten(0, 1), plain.flatten(0, 1))


@pytest.mark.parametrize("lengths", [(6, 6), (3, 6), (0, 2), (0, 0)])
def test_key_lengths_are_packed(backend: str, lengths: tuple[int, int]) -> None:
    q, k, v = _random((2, 5, 2, 40), (2, 6, 2, 40), (2, 6, 2, 40))
    mask = masks.KeyLengths(torch.tensor(lengths))
    out = anyattn.attention(q, k, v, mask, backend=backend)
    truth, plain = (reference.attention(q, k, v, mask, dtype=dtype)[0] for dtype in (torch.float64, torch.bfloat16))
    _assert_right(out.flatten(0, 1), truth.flatten(0, 1), plain.flatten(0, 1))


def test_lse_is_refused_with_the_reason(backend: str) -> None:
    tensors = _random((7, 2, 64), (7, 2, 64), (7, 2, 64))
    with pytest.raises(anyattn.UnsupportedCallError, match="lse: needs return_lse=False"):
        _varlen(backend, tensors, (3, 4), (3, 4), return_lse=True)
    with pytest.raises(anyattn.UnsupportedCallError, match="lse: needs return_lse=False"):
        anyattn.attention(
            *(t[None] for t in tensors), masks.KeyLengths(torch.tensor([3])), return_lse=True, backend=backend
        )


def test_gradients_are_refused_and_no_grad_is_not(backend: str) -> None:
    tensors = [t.requires_grad_() for t in _random((7, 2, 64), (7, 2, 64), (7, 2, 64))]
    with pytest.raises(anyattn.UnsupportedCallError, match="backward"):
        _varlen(backend, tensors, (3, 4), (3, 4))
    with torch.no_grad():
        assert _varlen(backend, tensors, (3, 4), (0, 7)).shape == tensors[0].shape


@pytest.mark.parametrize("missing", ["function", "parameter"])
def test_build_without_the_function_serves_what_it_can(
    backend: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, **kwargs: Any) -> Tensor:
        raise AssertionError("never called")

    if missing == "function":
        monkeypatch.delattr(sys.modules["sageattention"], packed.ENTRY)
    else:
        monkeypatch.setattr(sys.modules["sageattention"], packed.ENTRY, old)
    tensors = _random((7, 2, 64), (7, 2, 64), (7, 2, 64))
    assert anyattn.attention(*(t[None] for t in tensors), backend=backend).shape == (1, 7, 2, 64)
    said = "no function sageattn_varlen" if missing == "function" else "no parameter cu_seqlens_k and max_seqlen_k"
    with pytest.raises(anyattn.KernelError, match=said):
        _varlen(backend, tensors, (3, 4), (3, 4))


@pytest.mark.parametrize("wrong", [lambda out: (out, out), lambda out: out[..., :8]])
def test_what_comes_back_is_looked_at(backend: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _random((7, 2, 64), (7, 2, 64), (7, 2, 64))
    _varlen(backend, tensors, (3, 4), (3, 4))
    right = FUNCTIONS[backend].varlen
    monkeypatch.setattr(FUNCTIONS[backend], "varlen", lambda *given, **options: wrong(right(*given, **options)))
    with pytest.raises(anyattn.KernelError, match="sageattn_varlen returned"):
        _varlen(backend, tensors, (3, 4), (3, 4))


def test_checks_find_values_that_overflow_and_results_that_are_wrong(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    q, k, v = _random((70, 2, 64), (70, 2, 64), (70, 2, 64))
    _varlen(backend, [q, k, v], (30, 40), (40, 30))
    large = v.clone()
    large[0, 0, 0] = -1100.0
    with pytest.raises(anyattn.InvalidCallError, match="the chosen kernel can represent"):
        _varlen(backend, [q, k, large], (30, 40), (40, 30))
    mask = masks.KeyLengths(torch.tensor([69]))
    with pytest.raises(anyattn.InvalidCallError, match="the chosen kernel can represent"):
        anyattn.attention(q[None], k[None], large[None], mask, backend=backend)
    right = FUNCTIONS[backend].varlen
    monkeypatch.setattr(FUNCTIONS[backend], "varlen", lambda *given, **options: 2 * right(*given, **options))
    anyattn.reset()
    with pytest.raises(anyattn.KernelError, match="disagrees with the reference"):
        _varlen(backend, [q, k, v], (30, 20, 20), (40, 10, 20))
