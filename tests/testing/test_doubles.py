"""Every law on every adapter whose kernel can't run here, against its contract double."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import doubles
import law_counts
from anyattn.selection import registry
from anyattn.testing.verify import BackendReport, verify

CASES = 60


@functools.cache
def reported(name: str) -> BackendReport:
    """Verify an adapter against its double, once for all tests that look at what came of it."""
    with doubles.installed(name):
        (report,) = verify(name, device="cpu", cases=CASES).backends
    return report


@pytest.mark.parametrize("name", doubles.DOUBLES)
def test_laws_hold_against_the_double(name: str, record_property: Callable[[str, object], None]) -> None:
    report = reported(name)
    record_property(law_counts.PROPERTY, law_counts.counts(report))
    assert report.ran == "contract double"
    assert report.status == "passed", report


@pytest.mark.parametrize("name", doubles.DOUBLES)
def test_every_adapter_executed_laws(name: str) -> None:
    executed = {law.law: law.run for law in reported(name).laws}
    assert executed["right"] >= 20, executed
    assert executed["rejected"] > 0


def test_every_built_backend_without_a_cpu_kernel_has_a_double() -> None:
    without = {
        name
        for name in registry.BUILTIN
        if "cpu" not in registry.get(name).declarations and not name.startswith("native")  # type: ignore[union-attr]
    }
    assert without == set(doubles.DOUBLES)
