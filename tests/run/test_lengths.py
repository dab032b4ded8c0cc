"""Calls that differ in their lengths alone are decided once for a range, and exactly as each would be by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.run import lengths
from anyattn.scopes import defaults
from anyattn.selection import decide, registry
from anyattn.selection.choice import choice_of
from anyattn.types.spec import AttentionSpec


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[AttentionSpec]]:
    """The calls that are decided, for the range of another call too."""
    seen: list[AttentionSpec] = []
    whole = decide.decision_for

    def noted(spec: AttentionSpec, *rest: Any, **options: Any) -> Any:
        seen.append(spec)
        return whole(spec, *rest, **options)

    monkeypatch.setattr(decide, "decision_for", noted)
    anyattn.reset()
    yield seen
    anyattn.reset()


def _step(seqlen_kv: int, *, seqlen_q: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(seqlen_kv)
    return [torch.randn(1, 2, seqlen, 16, dtype=dtype) for seqlen in (seqlen_q, seqlen_kv, seqlen_kv)]


def _right(out: Tensor, tensors: list[Tensor], mask: Any = None) -> None:
    query, key, value = (tensor.transpose(1, 2).double() for tensor in tensors)
    truth, _ = reference.attention(query, key, value, mask)
    torch.testing.assert_close(out.double(), truth.transpose(1, 2), atol=2e-2, rtol=2e-2)


def test_decoding_decides_a_few_lengths_of_each_range(decisions: list[AttentionSpec]) -> None:
    for length in range(64, 300):
        tensors = _step(length)
        out = anyattn.scaled_dot_product_attention(*tensors)
        if length % 16 == 1:
            _right(out, tensors)
    # Three ranges; in each the first three calls are decided, and the ends of the range.
    assert len(decisions) <= 3 * 5


def test_both_layouts_and_causal_calls_of_growing_length_are_served(decisions: list[AttentionSpec]) -> None:
    for length in range(65, 100):
        tensors = _step(length, seqlen_q=length)
        _right(anyattn.scaled_dot_product_attention(*tensors, is_causal=True), tensors, masks.Causal())
        swapped = [tensor.transpose(1, 2) for tensor in tensors]
        _right(anyattn.attention(*swapped).transpose(1, 2), tensors)
    assert len(decisions) <= 2 * 5


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4", "xformers"])
def test_kernels_run_other_lengths_than_those_that_were_decided(backend: str, decisions: list[AttentionSpec]) -> None:
    with doubles.installed(backend):
        decisions.clear()
        for length in range(130, 150):
            tensors = _step(length, dtype=torch.bfloat16)
            _right(anyattn.scaled_dot_product_attention(*tensors, backend=backend), tensors)
    assert len(decisions) <= 5 if backend != "xformers" else len(decisions) <= 20


def test_recording_names_the_lengths_of_each_call() -> None:
    for length in range(70, 80):
        anyattn.scaled_dot_product_attention(*_step(length))
    with anyattn.record() as calls:
        for length in range(75, 85):
            anyattn.scaled_dot_product_attention(*_step(length))
    assert [call.spec.seqlen_kv for call in calls] == list(range(75, 85))


def test_backend_whose_lengths_may_all_matter_decides_each(decisions: list[AttentionSpec]) -> None:
    class Odd(type(registry.get("native_math"))):  # type: ignore[misc]
        """It refuses some lengths, and doesn't say which are alike."""

        name = "odd"

        def rejects(self, spec: AttentionSpec, env: Any) -> Iterator[Any]:
            if spec.seqlen_kv == 75:
                yield anyattn.Reason("size", "another length", "75")

        def length_period(self, spec: AttentionSpec) -> int:
            return 0

    registry.register(Odd())
    try:
        for length in range(70, 75):
            anyattn.scaled_dot_product_attention(*_step(length), backend="odd")
        with pytest.raises(anyattn.UnsupportedCallError, match="another length"):
            anyattn.scaled_dot_product_attention(*_step(75), backend="odd")
        with anyattn.record() as calls:
            anyattn.scaled_dot_product_attention(*_step(75), backend=["odd", "native"])
        assert calls[0].chosen == "native"
    finally:
        registry.unregister("odd")


def test_threshold_inside_a_range_leaves_every_length_to_itself(decisions: list[AttentionSpec]) -> None:
    class Short(type(registry.get("native_math"))):  # type: ignore[misc]
        """It refuses more than 80 keys."""

        name = "short"

        def rejects(self, spec: AttentionSpec, env: Any) -> Iterator[Any]:
            if spec.seqlen_kv > 80:
                yield anyattn.Reason("size", "at most 80 keys", str(spec.seqlen_kv))

    registry.register(Short())
    try:
        chosen = []
        for length in range(76, 86):
            anyattn.scaled_dot_product_attention(*_step(length), backend=["short", "native"])
            with anyattn.record() as calls:
                anyattn.scaled_dot_product_attention(*_step(length), backend=["short", "native"])
            chosen.append(calls[0].chosen)
        assert chosen == ["short"] * 5 + ["native"] * 5
        with pytest.raises(anyattn.UnsupportedCallError, match="at most 80 keys"):
            anyattn.scaled_dot_product_attention(*_step(81), backend="short")
    finally:
        registry.unregister("short")


_LENGTH = st.integers(1, 3000)


@given(
    q=_LENGTH,
    kv=_LENGTH,
    near=st.tuples(st.integers(0, 1 << 12), st.integers(0, 1 << 12)),
    backend=st.sampled_from(["native", "native_flash", "native_math", "auto", "flash2", "flash3", "flash4", "sage"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dim=st.sampled_from([16, 64, 96]),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    grad=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_what_serves_a_range_is_what_each_of_its_calls_would_get(
    q: int,
    kv: int,
    near: tuple[int, int],
    backend: str,
    dtype: torch.dtype,
    dim: int,
    heads: tuple[int, int],
    grad: bool,
) -> None:
    grads = ("key", "query", "value") if grad else ()
    spec = AttentionSpec(1, q, kv, *heads, dim, dim, dtype, "cpu", dim**-0.5, requires_grad=grads, same_lengths=q == kv)
    names = ["flash2", "flash3", "flash4", "sage"]
    with doubles.installed(backend if backend in names else "flash2"):
        scope = defaults.scope_for(defaults.current.get().settings)
        with anyattn.attention_backend(backend):
            scope = defaults.current.get()
            decision = decide.decision_for(spec, scope, decide.detect(), here=True)
            if decision.chosen is None or choice_of(decision).backend.length_period(spec) == 0:
                return
            wanted = lengths._what_runs(decision)
            period = choice_of(decision).backend.length_period(spec)
            ends = [_what(spec, scope, *end) for end in lengths._ends(spec, period)]
            if any(end != wanted for end in ends):
                return
            other = [_moved(length, by, period) for length, by in zip((q, kv), near, strict=True)]
            if q == kv:
                other[1] = other[0]
            if (other[0] > other[1]) - (other[0] < other[1]) != (q > kv) - (q < kv):
                return
            assert _what(spec, scope, *other) == wanted


def _moved(length: int, by: int, period: int) -> int:
    """Return another length of the same range and residue."""
    low, high = lengths._ends_of(length, period)
    return low if high <= low else low + by * period % (high - low + period)


def _what(spec: AttentionSpec, scope: Any, q: int, kv: int) -> Any:
    decision = decide.decision_for(spec.replace(seqlen_q=q, seqlen_kv=kv), scope, decide.detect(), here=True)
    return None if decision.chosen is None else lengths._what_runs(decision)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 129, 1000, 4095])
@pytest.mark.parametrize("period", [1, 32, 128])
def test_ends_of_a_range_have_its_residue(length: int, period: int) -> None:
    low, high = lengths._ends_of(length, period)
    bits = length.bit_length()
    if period == 1:
        assert (low, high) == (1 << (bits - 1), (1 << bits) - 1)
    if length.bit_length() > period.bit_length():
        assert low <= length <= high
        assert {low % period, high % period} == {length % period}
        assert low.bit_length() == high.bit_length() == bits
