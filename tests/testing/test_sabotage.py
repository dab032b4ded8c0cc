"""Each law catches the backends that break it, and passes the right ones they are made of."""

from __future__ import annotations

import random

import pytest

from anyattn.testing.cases.drawing import always, draw, space
from anyattn.testing.laws import LAWS, LawBroken
from anyattn.testing.sabotage import SABOTAGED, registered

SOONER = {"takes a mask function's first entry for all": "document"}
"""What the mask of a case has in it that the sabotage spoils.

These cases come before the others, where each takes dynamo a new trace of eager flex.
"""


def test_every_law_is_sabotaged() -> None:
    assert {sabotage.law for sabotage in SABOTAGED.values()} == set(LAWS)


@pytest.mark.parametrize("what", SABOTAGED)
def test_law_catches_sabotage(what: str) -> None:
    sabotage = SABOTAGED[what]
    law = LAWS[sabotage.law]
    backend = sabotage.make()
    caps = backend.declarations["cpu"]
    rng = random.Random(0)
    cases = [*always(caps), *(draw(rng, space(None if law.wide else caps)) for _ in range(60))]
    cases = cases[:: min(law.share, 3)]
    if what in SOONER:
        cases.sort(key=lambda case: SOONER[what] not in case.mask)
    caught = None
    with registered(backend) as name:
        for case in cases:
            try:
                law.check(name, law.apt(case, caps))
            except LawBroken as broken:
                caught = broken
                break
    assert caught is not None, f"the law {law.name} passes a backend that {what}"
    assert caught.law == sabotage.law
    assert repr(caught.case) in caught.reproduction
