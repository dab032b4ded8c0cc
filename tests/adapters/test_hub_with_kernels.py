"""flash2_hub through the real package `kernels`, with a repository on this disk; no network is there to be used.

The repository holds the functions of flash-attn's contract double, as a kernel of Python alone: what is proven is the
adapter and how it asks `kernels`, never a kernel.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import anyattn
import doubles
from anyattn.adapters.flash2 import Flash2Hub
from anyattn.errors import BackendUnavailableError
from anyattn.testing import verify
from doubles.double import Double

kernels = pytest.importorskip("kernels", reason="the Hub's kernels need anyattn[hub]")
hub_constants = pytest.importorskip("huggingface_hub.constants", reason="the Hub's kernels need anyattn[hub]")

SOURCE = "from doubles.kernels.flash2 import flash_attn_func, flash_attn_varlen_func\n"
VARIANT = "torch-universal"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise OSError("this test has no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Give a way to write a repository to the disk and to have LOCAL_KERNELS name it."""

    def write(variant: str = VARIANT, source: str = SOURCE, **metadata: Any) -> Path:
        folder = tmp_path / "build" / variant
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        about = {
            "id": f"_flash_attn2_double_{abs(hash(str(tmp_path)))}",
            "name": "flash-attn2",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": "cpu"},
            **metadata,
        }
        (folder / "metadata.json").write_text(json.dumps(about))
        monkeypatch.setenv("LOCAL_KERNELS", f"someone/else=/nowhere:{Flash2Hub.hub.repo}={tmp_path}")
        anyattn.reset()
        return tmp_path

    return write


# The real package in place of a double of it: no module is faked.
REAL = Double("flash2_hub", {"kernels": kernels.__version__}, dict)


def call() -> torch.Tensor:
    query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    return anyattn.attention(query, query, query, backend="flash2_hub")  # type: ignore[return-value]


def test_laws_hold_through_the_real_package(repository: Callable[..., Path]) -> None:
    repository()
    with doubles.installed("flash2_hub", REAL):
        report = verify("flash2_hub", device="cpu", cases=15)
    assert report.passed, str(report)
    executed = {law.law: law.run for law in report.backends[0].laws}
    assert executed["right"] >= 20


def test_local_folder_is_used_and_reported(repository: Callable[..., Path]) -> None:
    folder = repository()
    with doubles.installed("flash2_hub", REAL), anyattn.record() as calls:
        out = call()
    assert out.shape == (1, 8, 2, 16)
    (decision,) = calls
    assert decision.origin == (
        f"the local folder {folder}, named by LOCAL_KERNELS for {Flash2Hub.hub.repo}, "
        "which bypasses the pinned revision and publisher trust"
    )


def failure() -> str:
    with doubles.installed("flash2_hub", REAL), pytest.raises(BackendUnavailableError) as caught:
        call()
    assert caught.value.reasons
    return str(caught.value)


def test_build_for_another_torch_is_said_with_what_there_is(repository: Callable[..., Path]) -> None:
    repository("torch21-cxx11-cu118-x86_64-linux")
    text = failure()
    assert "torch21-cxx11-cu118-x86_64-linux" in text
    assert "use a torch and CUDA that it has a build for" in text


def test_missing_python_dependency_is_said_with_the_command(repository: Callable[..., Path]) -> None:
    # None of what kernels knows by this name is installed here: a compiler of Huawei's.
    known = json.loads((Path(kernels.__file__).parent / "python_depends.json").read_text())["general"]
    absent = [
        (name, package["pkg"])
        for name, about in known.items()
        for package in about["python"]
        if package.get("import") and not _importable(package["import"])
    ]
    if not absent:
        pytest.skip("every Python package that kernels may ask for is installed here")
    name, package = absent[0]
    repository(**{"python-depends": [name]})
    text = failure()
    assert f"requires Python dependency `{package}`" in text
    assert f"; pip install {package}" in text


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_kernel_for_newer_kernels_is_said_with_the_command(repository: Callable[..., Path]) -> None:
    repository(**{"kernels-minver": "99.0.0"})
    assert "pip install --upgrade kernels" in failure()


def test_kernel_that_fails_to_import_is_unavailable(repository: Callable[..., Path]) -> None:
    repository(source="raise ImportError('_flash.abi3.so: undefined symbol: _ZN3c10')\n")
    assert "the build is for another torch" in failure()


def test_kernel_without_the_functions_is_unavailable(repository: Callable[..., Path]) -> None:
    repository(source="def flash_attn_func(): ...\n")
    assert "has no function flash_attn_varlen_func" in failure()


def test_folder_that_is_not_there_is_unavailable(repository: Callable[..., Path], monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", f"{Flash2Hub.hub.repo}=/nowhere/at/all")
    anyattn.reset()
    assert "/nowhere/at/all" in failure()


def test_without_a_network_the_hub_is_unavailable_with_the_cause() -> None:
    text = failure()
    assert Flash2Hub.hub.revision in text
    assert "this test has no network" in text
    assert "HF_HUB_OFFLINE=1 once the kernel is on this machine" in text


def test_offline_without_a_copy_is_unavailable_and_the_skipped_check_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    anyattn.reset()
    with caplog.at_level(logging.WARNING), doubles.installed("flash2_hub", REAL):
        query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
        decision = anyattn.explain(query, query, query, backend="flash2_hub")
    assert "with HF_HUB_OFFLINE the publisher's trust isn't checked" in decision.origin
    assert not caplog.records, "explaining asks kernels nothing"
    with caplog.at_level(logging.WARNING):
        assert "go online once" in failure()
    assert any("publisher trust" in record.message for record in caplog.records)
