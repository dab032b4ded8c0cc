"""The double of `kernels` asks for what the real package asks for."""

from __future__ import annotations

import inspect

import pytest

from anyattn.adapters.flash2 import Flash2Hub
from doubles import hub
from doubles.kernels import flash2


def test_signature_is_the_real_packages() -> None:
    kernels = pytest.importorskip("kernels", reason="the Hub's kernels need anyattn[hub]")
    double = hub.FLASH2.modules()["kernels"]
    assert double.__version__ == kernels.__version__
    mine, theirs = (inspect.signature(module.get_kernel).parameters for module in (double, kernels))
    assert list(mine) == list(theirs)
    assert [(p.kind, p.default) for p in mine.values()] == [(p.kind, p.default) for p in theirs.values()]


def test_exactly_one_pin_is_needed() -> None:
    get_kernel = hub.FLASH2.modules()["kernels"].get_kernel
    for pins in ({}, {"revision": Flash2Hub.hub.revision, "version": 1}):
        with pytest.raises(ValueError, match="Only one of"):
            get_kernel(Flash2Hub.hub.repo, **pins)
    with pytest.raises(TypeError):
        get_kernel(Flash2Hub.hub.repo, Flash2Hub.hub.revision)


@pytest.mark.parametrize(
    ("repo", "pins"), [("someone/else", {"revision": Flash2Hub.hub.revision}), (Flash2Hub.hub.repo, {"version": 3})]
)
def test_other_repositories_and_states_are_not_there(repo: str, pins: dict[str, object]) -> None:
    with pytest.raises(FileNotFoundError, match="Cannot find a build variant"):
        hub.FLASH2.modules()["kernels"].get_kernel(repo, **pins)


def test_functions_are_those_of_the_packages_double() -> None:
    module = hub.FLASH2.modules()["kernels"].get_kernel(Flash2Hub.hub.repo, revision=Flash2Hub.hub.revision)
    assert module.flash_attn_func is flash2.flash_attn_func
    assert module.flash_attn_varlen_func is flash2.flash_attn_varlen_func
