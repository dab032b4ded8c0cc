"""Quantised kernels are judged by what their number format allows, and by nothing looser."""

from __future__ import annotations

import pytest
import torch

import doubles
from anyattn import testing
from anyattn.testing import Case, LawBroken, check
from anyattn.testing.laws.quantised import as_fp8, as_int8, format_of, holds
from anyattn.testing.sabotage import registered
from anyattn.testing.verify import verify
from anyattn.testing.wrong_backends import Coarse


class _SaysExact(Coarse):
    declarations = {"cpu": Coarse.declarations["cpu"].replace(exact=True, quantised="")}


class _SaysNothing(Coarse):
    declarations = {"cpu": Coarse.declarations["cpu"].replace(quantised="")}


def test_right_quantised_kernel_keeps_every_law() -> None:
    with registered(Coarse()) as name:
        report = verify(name, device="cpu", cases=60)
    assert report.passed, str(report)
    executed = {law.law: law.run for law in report.backends[0].laws}
    assert executed["right"] >= 40, executed
    assert executed["halves"] >= 10, executed


@pytest.mark.parametrize("backend", [_SaysExact, _SaysNothing])
def test_kernel_that_does_not_say_quantised_is_judged_exactly(backend: type[Coarse]) -> None:
    with registered(backend()) as name, pytest.raises(LawBroken, match="multiples"):
        check("right", name, Case(seqlen_q=37, seqlen_kv=64))


def test_double_of_a_quantised_kernel_is_judged_exactly() -> None:
    with doubles.installed("sage"):
        assert format_of("sage") == ""
    with doubles.installed("flash3_fp8"):
        assert format_of("flash3_fp8") == "fp8", "its adapter hands the kernel what is quantised already"
    assert format_of("sage") == "fp8"
    assert format_of("sage_int8_fp16") == "int8"
    assert format_of("native") == ""


def test_scores_too_large_for_int8_are_asked_nothing() -> None:
    large, normal = Case(data="large", head_dim=64, seqlen_kv=64), Case(head_dim=64, seqlen_kv=64)
    assert not holds(large.build(), "int8")
    assert holds(normal.build(), "int8")
    assert holds(normal.build(), "fp8")
    with registered(Coarse()) as name:
        assert check("right", name, large).status == "refused"
        assert check("right", name, normal).status == "passed"


def test_keys_with_a_common_offset_are_held_by_int8() -> None:
    assert holds(Case(data="shifted", seqlen_q=17, seqlen_kv=19).build(), "int8")


def test_rounding_keeps_to_its_format() -> None:
    values = torch.randn(2, 50, 3, 16, dtype=torch.float64)
    assert len(as_int8(values)[0, :, 0].unique()) <= 255
    assert float((as_int8(values) - values).abs().max()) <= float(values.abs().max()) / 127 / 2 * (1 + 1e-9)
    assert float(((as_fp8(values) - values) / values).abs().median()) < 2**-4


def test_budget_is_one_tenth_of_the_truth() -> None:
    class Off(Coarse):
        @staticmethod
        def run(plan, query, key, value, parts):  # type: ignore[no-untyped-def]
            return Coarse.run(plan, query, key, 1.09 * value, parts)

    class FartherOff(Coarse):
        @staticmethod
        def run(plan, query, key, value, parts):  # type: ignore[no-untyped-def]
            return Coarse.run(plan, query, key, 1.11 * value, parts)

    case = Case(seqlen_q=37, seqlen_kv=64)
    with registered(Off()) as name:
        assert 0.85 < check("right", name, case).worst < 1
    with registered(FartherOff()) as name, pytest.raises(LawBroken):
        check("right", name, case)


def test_suite_takes_a_quantised_backend() -> None:
    with registered(Coarse()) as name:
        assert testing.run(name, device="cpu", cases=5).passed
