"""A wrong call raises an error of ours before any kernel runs, says what to do, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anyattn
from anyattn import masks
from anyattn.adapters.native import kernels
from anyattn.errors import AnyattnError, InvalidCallError, UnsupportedCallError
from anyattn.scopes import defaults

B, SQ, SKV, H, D = 2, 9, 12, 4, 16


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "query": torch.randn(B, SQ, H, D),
        "key": torch.randn(B, SKV, H, D),
        "value": torch.randn(B, SKV, H, D),
    }
    arguments.update(changes)
    return anyattn.attention(**arguments)


def bools(*shape: int) -> torch.Tensor:
    return torch.rand(shape) > 0.5


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"query": torch.randn(B, SQ, D)}, "four dimensions"),
    "not a tensor": ({"key": [1.0]}, "must be a tensor"),
    "numpy in place of a tensor": ({"value": torch.randn(B, SKV, H, D).numpy()}, "must be a tensor"),
    "lengths of key and value": ({"value": torch.randn(B, 4, H, D)}, "same length"),
    "batch sizes": ({"key": torch.randn(3, SKV, H, D), "value": torch.randn(3, SKV, H, D)}, "same batch size"),
    "a batch of one isn't broadcast": (
        {"key": torch.randn(1, SKV, H, D), "value": torch.randn(1, SKV, H, D)},
        "isn't broadcast",
    ),
    "heads of key and value": ({"value": torch.randn(B, SKV, 2, D)}, "same number of heads"),
    "one key head without the flag": (
        {"key": torch.randn(B, SKV, 1, D), "value": torch.randn(B, SKV, 1, D)},
        "enable_gqa=True",
    ),
    "heads that don't divide": (
        {"key": torch.randn(B, SKV, 3, D), "value": torch.randn(B, SKV, 3, D), "enable_gqa": True},
        "multiple of key's",
    ),
    "head_dim of query and key": ({"key": torch.randn(B, SKV, H, 8)}, "same head_dim"),
    "dtypes": ({"key": torch.randn(B, SKV, H, D, dtype=torch.float64)}, "one dtype"),
    "integer tensors": (
        {name: torch.ones(B, 9, H, D, dtype=torch.int64) for name in ("query", "key", "value")},
        "floating-point",
    ),
    "devices": ({"value": torch.randn(B, SKV, H, D, device="meta")}, "one device"),
    "no heads": ({name: torch.randn(B, 9, 0, D) for name in ("query", "key", "value")}, "must not be 0"),
    "a nested tensor": (
        {"query": torch.nested.nested_tensor([torch.randn(3, H, D), torch.randn(4, H, D)])},
        "nested tensor",
    ),
    "a jagged tensor": (
        {"query": torch.nested.nested_tensor([torch.randn(3, H, D), torch.randn(4, H, D)], layout=torch.jagged)},
        "nested tensor",
    ),
    "a mask that doesn't broadcast": ({"attn_mask": bools(7, SKV)}, "broadcast"),
    "a mask of five dimensions": ({"attn_mask": bools(1, B, H, SQ, SKV)}, "broadcast"),
    "padding as a mask": ({"attn_mask": bools(B, SKV)}, "KeyPadding"),
    "a batched mask of three dimensions": ({"attn_mask": bools(B, SQ, SKV)}, "mask\\[:, None\\]"),
    "an integer mask": ({"attn_mask": torch.ones(SQ, SKV, dtype=torch.int64)}, "bool\\(\\)"),
    "a half mask for a float query": ({"attn_mask": torch.zeros(SQ, SKV, dtype=torch.float16)}, "float32"),
    "a mask elsewhere": ({"attn_mask": torch.zeros(SQ, SKV, device="meta")}, "move it"),
    "a mask of another type": ({"attn_mask": "causal"}, "attn_mask must be"),
    "key padding of the wrong length": ({"attn_mask": masks.KeyPadding(bools(B, 5))}, "KeyPadding needs"),
    "key padding that is all True and wrong": (
        {"attn_mask": masks.KeyPadding(torch.ones(B, 5, dtype=torch.bool))},
        "KeyPadding needs",
    ),
    "key lengths of the wrong batch": ({"attn_mask": masks.KeyLengths(torch.tensor([1, 2, 3]))}, "KeyLengths needs"),
    "dropout above one": ({"dropout_p": 1.1}, "\\[0, 1\\]"),
    "negative dropout": ({"dropout_p": -0.1}, "\\[0, 1\\]"),
    "dropout that isn't a number": ({"dropout_p": "0.1"}, "number"),
    "a scale that is NaN": ({"scale": float("nan")}, "finite"),
    "a scale that is infinite": ({"scale": float("inf")}, "finite"),
    "a scale that is a tensor": ({"scale": torch.tensor([0.5])}, "number"),
    "is_causal that is no flag": ({"is_causal": "yes"}, "is_causal"),
    "a window of one side": ({"window": (3,)}, "window"),
    "a window below -1": ({"window": (-2, 3)}, "window"),
    "a window of floats": ({"window": (1.5, 3)}, "window"),
    "two windows": ({"window": (1, 1), "attn_mask": masks.SlidingWindow(2, 2)}, "once"),
    "two alignments": ({"is_causal": True, "attn_mask": masks.Causal("lower_right")}, "lower-right"),
    "a softcap of zero": ({"softcap": 0.0}, "softcap"),
    "sinks of the wrong shape": ({"sinks": torch.randn(3)}, "sinks"),
    "sinks that aren't a tensor": ({"sinks": [0.0] * H}, "sinks"),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math", "flex", "auto"])
def test_wrong_call_is_refused_before_any_kernel(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, says = BAD[name]
    monkeypatch.setattr(kernels, "_ENTRIES", {})  # a kernel that ran would fail with a KeyError
    before = len(defaults.current.get().table)
    with pytest.raises(InvalidCallError, match=says):
        call(**changes, backend=backend)
    assert len(defaults.current.get().table) == before


@pytest.mark.parametrize("name", [name for name in BAD if "query" not in BAD[name][0]])
def test_wrong_call_is_refused_after_a_right_one_of_the_same_shapes(name: str) -> None:
    call()
    changes, says = BAD[name]
    with pytest.raises(InvalidCallError, match=says):
        call(**changes)
    call()


def test_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="window_size"):
        call(window_size=(1, 1))


def test_error_says_what_was_given() -> None:
    with pytest.raises(InvalidCallError, match=r"\(2, 9, 4, 16\).*\(2, 12, 4, 16\).*\(2, 4, 4, 16\)"):
        call(value=torch.randn(B, 4, H, D))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: masks.KeyPadding(torch.ones(2, 3)), "boolean"),
        (lambda: masks.KeyPadding(bools(2, 3, 4)), "boolean tensor"),
        (lambda: masks.KeyPadding([True]), "needs a tensor"),
        (lambda: masks.KeyLengths(torch.ones(2)), "int32 or int64"),
        (lambda: masks.Causal("centre"), "align"),  # type: ignore[arg-type]
        (lambda: masks.SlidingWindow(-3, 0), "window"),
        (lambda: masks.Boolean(torch.ones(3)), "boolean"),
        (lambda: masks.Bias(bools(3)), "floating"),
        (lambda: masks.Block(bools(3)), "BlockMask"),
        (lambda: masks.KeyPadding(bools(2, 3)) & masks.KeyPadding(bools(2, 3)), "at most one key mask"),
        (lambda: masks.Bias(torch.ones(3)) & masks.Boolean(bools(3)), "at most one dense mask"),
        (lambda: masks.Causal() & masks.Causal("lower_right"), "one alignment"),
    ],
)
def test_wrong_mask_object_is_refused_when_it_is_made(make: Any, says: str) -> None:
    with pytest.raises(InvalidCallError, match=says):
        make()


def test_mask_and_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        masks.Causal() & torch.ones(3)  # type: ignore[operator]


def test_joined_patterns_intersect() -> None:
    both = masks.SlidingWindow(5, 2) & masks.Causal()
    assert both.pattern == (5, 0, "upper_left")
    assert (masks.SlidingWindow(-1, 4) & masks.SlidingWindow(3, -1)).pattern == (3, 4, "upper_left")


def test_kernels_own_error_is_wrapped_and_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no viable kernel")

    monkeypatch.setitem(kernels._ENTRIES, "math", broken)  # type: ignore[arg-type]
    with pytest.raises(anyattn.KernelError, match=r"native_math .*no viable kernel") as caught:
        call(backend="native_math")
    assert caught.value.backend == "native_math"
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_out_of_memory_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(kernels._ENTRIES, "math", full)  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        call(backend="native_math")


def test_refusal_lists_every_reason_and_who_would_admit_the_call() -> None:
    with pytest.raises(UnsupportedCallError) as caught:
        call(backend="native_flash", dropout_p=0.5, softcap=2.0)
    text = str(caught.value)
    assert "dropout" in text
    assert "softcap" in text
    assert caught.value.decision.chosen is None
    assert {reason.code for reason in caught.value.decision.reasons("native_flash")} == {"dropout", "softcap"}
    with pytest.raises(UnsupportedCallError, match=r"Backends that would run it: .*flex"):
        call(backend="native_flash", softcap=2.0)


def test_list_that_admits_nothing_gives_every_candidates_reasons() -> None:
    with pytest.raises(UnsupportedCallError) as caught:
        call(backend=["native_flash", "native_math"], softcap=2.0, dropout_p=0.1)
    assert "native_flash" in str(caught.value)
    assert "native_math" in str(caught.value)


def test_every_error_is_an_anyattn_error() -> None:
    for error in (anyattn.KernelError, anyattn.UnknownBackendError, anyattn.BackendUnavailableError):
        assert issubclass(error, AnyattnError)
