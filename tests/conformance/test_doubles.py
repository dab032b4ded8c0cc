"""Every law on every adapter whose kernel can't run here, against its contract double."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import law_counts
from anyattn import registry
from anyattn.testing import doubles
from anyattn.testing.verify import BackendReport, verify

CASES = 60


@pytest.fixture(scope="module")
def counted() -> dict[str, BackendReport]:
    return {}


@pytest.mark.parametrize("name", doubles.DOUBLES)
def test_laws_hold_against_the_double(
    name: str, counted: dict[str, BackendReport], record_property: Callable[[str, object], None]
) -> None:
    with doubles.installed(name):
        report = verify(name, device="cpu", cases=CASES)
    counted[name] = report.backends[0]
    record_property(law_counts.PROPERTY, law_counts.counts(report.backends[0]))
    assert report.backends[0].ran == "contract double"
    assert report.passed, str(report)


def test_every_adapter_executed_laws(counted: dict[str, BackendReport]) -> None:
    for name, report in counted.items():
        executed = {law.law: law.run for law in report.laws}
        assert executed["right"] >= 20, (name, executed)
        assert executed["rejected"] > 0


def test_every_built_backend_without_a_cpu_kernel_has_a_double() -> None:
    without = {
        name
        for name in registry.BUILTIN
        if "cpu" not in registry.get(name).declarations and not name.startswith("native")  # type: ignore[union-attr]
    }
    assert without == set(doubles.DOUBLES)
