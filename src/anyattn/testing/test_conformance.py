"""The laws as tests, for `pytest --pyargs anyattn.testing`: see `anyattn.testing.suite`."""

from __future__ import annotations

import os

import pytest

from anyattn.environment import detect
from anyattn.selection import registry
from anyattn.testing.laws import LAWS
from anyattn.testing.suite import run

DEVICE = os.environ.get("ANYATTN_TEST_DEVICE", "cpu")
CASES = int(os.environ.get("ANYATTN_TEST_CASES", "60"))


def _usable(name: str) -> bool:
    backend = registry.get(name)
    if backend is None or backend.downloads:
        return False
    return DEVICE in backend.declarations and not any(backend.availability(detect()))


NAMES = [name for name in os.environ.get("ANYATTN_TEST_BACKENDS", "").split(",") if name]
NAMES = NAMES or [name for name in registry.names() if _usable(name)]


@pytest.mark.parametrize("name", NAMES)
def test_laws(name: str) -> None:
    """No law is broken, and something was run."""
    report = run(name, device=DEVICE, cases=CASES)
    assert {law.law for law in report.backends[0].laws} == set(LAWS)
