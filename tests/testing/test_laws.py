"""Every law on every usable backend on the CPU: the adversarial cases and drawn ones, the same each time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anyattn
import law_counts
from anyattn.selection import registry
from anyattn.testing.cases.case import Case
from anyattn.testing.cases.drawing import ADVERSARIAL, TILED, always, drawn, space, strategy
from anyattn.testing.laws import LAWS, check
from anyattn.testing.verify import BackendReport, verify

USABLE = tuple(row.name for row in anyattn.backends() if row.usable)
DRAWN = 120
"""How many cases are drawn for a backend."""


def _cases(name: str) -> int | list[Case]:
    """Give what a backend is verified with.

    torch traces eager flex again for each shape, which takes up to a second: it gets each adversarial case in one
    dtype, the first or the second, and few drawn ones.
    """
    if name != "flex":
        return DRAWN
    backend = registry.get(name)
    assert backend is not None
    caps = backend.declarations["cpu"]
    once = [case for index, case in enumerate(always(caps)) if index % 4 in (0, 3)]
    return [*once, *drawn(10, 0, space(caps))]


@functools.cache
def reported(name: str) -> BackendReport:
    """Verify a backend, once for all tests that look at what came of it.

    The law about torch.compile comes last: it makes dynamo forget what it traced of eager flex for the other laws.
    """
    in_turn = sorted(LAWS, key=lambda law: law == "compiled")
    report = verify(name, device="cpu", cases=_cases(name), laws=in_turn).backends
    assert len(report) == 1
    return report[0]


def test_known_backends_are_usable() -> None:
    assert {"native", "native_flash", "native_math", "flex"} <= set(USABLE)


@pytest.mark.parametrize("name", USABLE)
def test_laws_hold(name: str, record_property: Callable[[str, object], None]) -> None:
    report = reported(name)
    record_property(law_counts.PROPERTY, law_counts.counts(report))
    assert report.status == "passed", report


@pytest.mark.parametrize("name", USABLE)
def test_every_usable_backend_executed_laws(name: str) -> None:
    executed = {law.law: law.run for law in reported(name).laws}
    assert sum(executed.values()) > 100, executed
    assert executed["right"] > 50


def test_every_law_was_executed_by_some_backend() -> None:
    executed = {law.law for name in USABLE for law in reported(name).laws if law.run}
    assert executed == set(LAWS)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hypothesis_finds_nothing_wrong(data: st.DataObject) -> None:
    backend = registry.get("native")
    assert backend is not None
    check("right", "native", data.draw(strategy(backend.declarations["cpu"])))


@pytest.mark.parametrize("name", ["native", "native_flash", "native_math", "flex"])
def test_calls_over_several_tiles_are_right(name: str) -> None:
    cases = [case for case in TILED if case.seqlen_q < 300 and case.head_dim < 100 and not case.lse][::3]
    report = verify(name, device="cpu", cases=cases, laws=["right"])
    assert report.passed, str(report)
    assert report.backends[0].run >= 3


def test_calls_over_several_tiles_hold_every_pair_of_choices() -> None:
    fields = ("dtype", "grad", "kv_heads", "lse", "layout", "head_dim", "mask")
    choices = {field: {getattr(case, field) for case in TILED} for field in fields}
    for one, other in itertools.combinations(fields, 2):
        found = {(getattr(case, one), getattr(case, other)) for case in TILED}
        assert found == set(itertools.product(choices[one], choices[other])), (one, other)


@pytest.mark.parametrize("case", [*ADVERSARIAL[::6], *drawn(10, 3, space(None))], ids=repr)
def test_case_repr_is_the_case(case: Case) -> None:
    again = eval(repr(case), {"Case": Case})
    assert again == case
    assert hash(again) == hash(case)


def test_case_builds_the_same_tensors_each_time() -> None:
    case = Case(mask="bias:bhqk:own:inf", sinks=True, grad="qkvm")
    first, second = case.build(), case.build()
    assert first.mask is not None
    assert second.mask is not None
    assert first.mask.dense is not None
    assert second.mask.dense is not None
    assert first.mask.dense.equal(second.mask.dense)
    for name in ("query", "key", "value", "sinks"):
        assert getattr(first, name).equal(getattr(second, name))


@pytest.mark.parametrize("name", ["flash3", "native_cudnn"])
def test_backend_that_cannot_run_is_not_verified(name: str) -> None:
    report = verify(name, device="cpu", cases=1)
    assert report.backends[0].status == "not verified"
    assert report.backends[0].unusable
    assert not report.passed


def test_report_is_plain_data() -> None:
    import json

    report = verify("native_math", device="cpu", cases=2, laws=["right", "rejected"])
    data = json.loads(json.dumps(report.to_dict()))
    assert data["backends"][0]["laws"][0]["run"] == report.backends[0].laws[0].run > 0
