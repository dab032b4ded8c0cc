"""What every test starts from: one thread, fixed seeds, no preference set, nothing decided."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import anyattn
from anyattn import policy

VARIABLES = (
    policy.ENV_BACKEND,
    policy.ENV_BACKEND_DIFFUSERS,
    policy.ENV_CHECKS,
    policy.ENV_CHECKS_DIFFUSERS,
    "LOCAL_KERNELS",
    "KERNELS_CACHE",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    torch.manual_seed(0)
    anyattn.set_default_backend(None)
    anyattn.reset()
    yield
    anyattn.set_default_backend(None)
    anyattn.reset()
