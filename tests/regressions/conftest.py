"""The two doors to a backend: a call of anyattn, and Diffusers' dispatcher with the integration enabled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doors_to_backends import BACKENDS, Attend, through_diffusers

import anyattn

# The tiny models of Diffusers live beside the integration's own tests.
sys.path.append(str(Path(__file__).parents[1] / "integrations" / "diffusers"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def enabled() -> Iterator[None]:
    pytest.importorskip("diffusers", reason="the integration needs the extra anyattn[diffusers]")
    from anyattn.integrations import diffusers as integration

    integration.enable()
    yield
    integration.disable()


@pytest.fixture
def dispatch(enabled: None, backend: str) -> Attend:
    """Diffusers' dispatcher, sent to one backend of anyattn."""
    return functools.partial(through_diffusers, backend)


@pytest.fixture(params=["call", "diffusers"])
def attend(request: pytest.FixtureRequest, backend: str) -> Any:
    """Either door: what is tested holds for both."""
    if request.param == "call":
        return functools.partial(anyattn.attention, backend=backend)
    return request.getfixturevalue("dispatch")
