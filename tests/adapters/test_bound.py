"""Bound runners: what a repeated call runs is right, is short, and never runs a call that it wasn't bound for."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.adapters._flash import bound
from anyattn.adapters.flash3 import kernels as flash3
from anyattn.reference import tolerance
from anyattn.selection.choice import choice_of
from doubles.kernels import flash3 as flash3_double

BOUND = ("flash2", "flash3", "flash4", "sage", "sage_int8_fp8", "xformers")
LENGTHS = ("flash3", "flash4")


@pytest.fixture(params=BOUND)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with doubles.installed(request.param):
        yield request.param


def _tensors(*, seqlen: int = 128, keys: int = 128, layout: str = "BSHD", grad: bool = False) -> list[Tensor]:
    torch.manual_seed(seqlen + keys)
    sizes = ((2, seqlen, 2, 16), (2, keys, 2, 16), (2, keys, 2, 16))
    made = [torch.randn(size, dtype=torch.bfloat16) for size in sizes]
    if layout == "BHSD":
        made = [tensor.transpose(1, 2).contiguous() for tensor in made]
    return [tensor.requires_grad_(grad) for tensor in made]


def _is_right(out: Tensor, tensors: list[Tensor], mask: Any, *, coarse: bool, layout: str = "BSHD") -> bool:
    plain = [tensor.detach().transpose(1, 2) if layout == "BHSD" else tensor.detach() for tensor in tensors]
    out = out.detach().transpose(1, 2) if layout == "BHSD" else out.detach()
    truth, _ = reference.attention(*plain, mask)
    if coarse:
        return float((out.double() - truth).norm() / truth.norm()) < 0.1
    near, _ = reference.attention(*plain, mask, dtype=torch.bfloat16)
    return tolerance.excess(out, truth, tolerance.budget(truth, near, torch.bfloat16, over=(1, 3))) <= 1


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("causal", [False, True])
def test_repeated_calls_are_right_and_reach_the_kernel_through_the_short_table(
    backend: str, layout: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = anyattn.attention if layout == "BSHD" else anyattn.scaled_dot_product_attention
    tensors = _tensors(layout=layout)
    call(*tensors, is_causal=causal, backend=backend)
    monkeypatch.setattr("anyattn.api.run_any", lambda *arguments: pytest.fail("the call was looked up in full"))
    out = call(*tensors, is_causal=causal, backend=backend)
    mask = masks.Causal() if causal else None
    assert _is_right(out, tensors, mask, coarse="sage" in backend, layout=layout)  # type: ignore[arg-type]


def test_call_that_needs_gradients_is_not_run_by_what_was_bound_without(backend: str) -> None:
    anyattn.attention(*_tensors(), backend=backend)
    tensors = _tensors(grad=True)
    if "sage" in backend:
        with pytest.raises(anyattn.UnsupportedCallError, match="backward"):
            anyattn.attention(*tensors, backend=backend)
    else:
        anyattn.attention(*tensors, backend=backend).sum().backward()
        assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in tensors)
    with torch.no_grad():
        assert not anyattn.attention(*tensors, backend=backend).requires_grad


def test_call_that_is_wrong_is_refused_as_such_after_a_right_one(backend: str) -> None:
    query, key, value = _tensors()
    anyattn.attention(query, key, value, backend=backend)
    with pytest.raises(anyattn.InvalidCallError, match="dtype"):
        anyattn.attention(query, key.half(), value, backend=backend)
    with pytest.raises(anyattn.InvalidCallError, match="dtype"):
        anyattn.attention(query, key, value.float(), backend=backend)
    with pytest.raises(anyattn.InvalidCallError, match="device"):
        anyattn.attention(query, key.to("meta"), value, backend=backend)


def test_transforms_are_decided_anew_after_a_plain_call(backend: str) -> None:
    tensors = _tensors()
    expected = anyattn.attention(*tensors, backend=backend)
    stacked = [torch.stack((tensor, tensor)) for tensor in tensors]
    found = torch.vmap(lambda q, k, v: anyattn.attention(q, k, v, backend=[backend, "native_math"]))(*stacked)
    torch.testing.assert_close(found[1].float(), expected.float(), atol=0.03, rtol=0.03)


def test_planned_call_runs_the_whole_way_inside_a_transform(backend: str) -> None:
    tensors = _tensors()
    run = anyattn.plan(anyattn.explain(*tensors, backend=backend).spec, backend=backend)
    torch.testing.assert_close(run(*tensors), anyattn.attention(*tensors, backend=backend))


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("name", LENGTHS)
def test_key_masks_are_passed_as_lengths_and_follow_their_values(name: str, layout: str) -> None:
    call = anyattn.attention if layout == "BSHD" else anyattn.scaled_dot_product_attention
    tensors = _tensors(layout=layout)
    lengths, keep = torch.tensor([100, 0]), torch.rand(2, 128) < 0.5
    with doubles.installed(name):
        for _ in range(3):
            for mask in (masks.KeyLengths(lengths), masks.KeyPadding(keep)):
                out = call(*tensors, mask, backend=name)
                assert _is_right(out, tensors, mask, coarse=False, layout=layout)
            lengths.sub_(1).clamp_(0)
            keep.logical_not_()


def test_lse_of_a_bound_call_is_natural_and_marks_rows_without_a_key() -> None:
    tensors = _tensors(seqlen=8, keys=4)
    for name in ("flash2", "flash3", "flash4"):
        with doubles.installed(name):
            for _ in range(2):
                mask = masks.Causal("lower_right")
                out, lse = anyattn.attention(*tensors, mask, return_lse=True, backend=name)
            _, truth = reference.attention(*tensors, mask)
            torch.testing.assert_close(lse, truth.float(), atol=1e-4, rtol=1e-4)
            assert not out[:, :4].any()


def test_flash3_calls_its_operator_alone_where_no_gradient_is_needed() -> None:
    with doubles.installed("flash3", flash3_double.FORWARD):
        tensors = _tensors()
        calls = flash3_double.OPERATOR_CALLS
        for mask in (None, masks.Causal(), masks.KeyLengths(torch.tensor([128, 40]))):
            for _ in range(2):
                calls.clear()
                out = anyattn.attention(*tensors, mask, backend="flash3")
                assert len(calls) == 1
                assert _is_right(out, tensors, mask, coarse=False)
        _, lse = anyattn.attention(*tensors, return_lse=True, backend="flash3")
        torch.testing.assert_close(lse, reference.attention(*tensors)[1].float(), atol=1e-4, rtol=1e-4)


def _module(schema: str, name: str) -> types.ModuleType:
    library = torch.library.Library(f"anyattn_test_{name}", "DEF")
    library.define(schema)
    module = types.ModuleType("package")
    module.ops = getattr(torch.ops, f"anyattn_test_{name}")  # type: ignore[attr-defined]
    module.library = library  # type: ignore[attr-defined]
    return module


_KNOWN = (
    "Tensor q, Tensor k, Tensor v, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0"
)


@pytest.mark.parametrize(
    ("schema", "usable"),
    [
        (f"fwd({_KNOWN}) -> (Tensor, Tensor)", True),
        (f"fwd({_KNOWN}, Tensor? sinks=None) -> (Tensor, Tensor, Tensor, Tensor)", True),
        (f"fwd({_KNOWN.replace('float softcap=0.0', 'float cap=0.0')}) -> (Tensor, Tensor)", False),
        (f"fwd({_KNOWN}, *, int rounds) -> (Tensor, Tensor)", False),
        (f"fwd({_KNOWN.replace('Tensor q, Tensor k', 'Tensor k, Tensor q')}) -> (Tensor, Tensor)", False),
        (f"fwd({_KNOWN}) -> Tensor", False),
        ("bwd(Tensor q) -> Tensor", False),
    ],
    ids=["plain", "with sinks", "another name", "required argument", "another order", "no lse", "no fwd"],
)
def test_operator_is_used_only_if_every_argument_is_known_or_optional(
    schema: str, usable: bool, request: pytest.FixtureRequest
) -> None:
    name = "".join(letter for letter in request.node.callspec.id if letter.isalpha())
    assert (flash3.operator_of(_module(schema, name)) is not None) == usable


def test_calls_that_convert_something_are_run_the_whole_way() -> None:
    odd = [tensor[..., :12] for tensor in _tensors()]  # head_dim is padded
    with doubles.installed("flash3"):
        planned = anyattn.plan(anyattn.explain(*odd, backend="flash3").spec, backend="flash3")
        assert bound.bind(choice_of(planned.decision).plan, lambda *tensors: tensors[0]) is None
        for _ in range(2):
            assert _is_right(anyattn.attention(*odd, backend="flash3"), odd, None, coarse=False)
