"""What every test starts from: one thread, fixed seeds, no preference set, nothing decided."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

import anyattn
from anyattn.policy.policy import ENV_POLICY
from anyattn.scopes import defaults
from law_counts import pytest_sessionfinish, pytest_terminal_summary

# The same two processors run every test: a pool of inductor's, in which each process imports torch, makes none faster.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# No test reads or writes this user's measurements.
os.environ["ANYATTN_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"anyattn-tests-{os.getpid()}")

__all__ = ["pytest_sessionfinish", "pytest_terminal_summary"]
"""The hooks that pytest looks for here; fixtures it finds anyway."""

VARIABLES = (
    defaults.ENV_BACKEND,
    defaults.ENV_BACKEND_DIFFUSERS,
    defaults.ENV_CHECKS,
    defaults.ENV_CHECKS_DIFFUSERS,
    "ANYATTN_TUNE",
    "ANYATTN_TUNE_BUDGET_MS",
    ENV_POLICY,
    "LOCAL_KERNELS",
    "KERNELS_CACHE",
)


@pytest.fixture(autouse=True, scope="module")
def quick(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Leave out, for one file, two costs of torch that no test is about.

    A full collection of garbage walks all of torch, sympy and Diffusers, which takes up to two seconds. What is alive
    when a file starts is kept out of later ones; what its tests make is collected as ever.

    Dynamo times its guards after each compilation, for a line in its log, and empties the processor's caches first.
    """
    gc.collect()
    gc.freeze()
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        monkeypatch_module.setattr(guards, "profile_guard_manager", lambda *arguments: 0.0)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


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
