"""The errors of calls that nothing runs: each reason once, no empty heading, and the list that would run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import anyattn
from anyattn.environment import preset
from anyattn.errors import AnyattnError, BackendUnavailableError, UnsupportedCallError
from anyattn.selection import registry
from anyattn.selection.refusals import refusal
from anyattn.selection.registry import known, names
from anyattn.selection.resolve import resolve
from anyattn.types.decision import Preference
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec


def call(**arguments: Any) -> Any:
    query = torch.randn(1, 6, 2, 8)
    return anyattn.attention(query, query, query, **arguments)


def error_of(**arguments: Any) -> AnyattnError:
    with pytest.raises(AnyattnError) as caught:
        call(**arguments)
    return caught.value


def reasons_in(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.lstrip().startswith("- ")]


def test_lists_error_names_what_was_listed_and_each_reason_once() -> None:
    text = str(error_of(backend=["flash2", "native_cudnn"]))
    head, *rest = text.splitlines()
    assert head.startswith("No backend of flash2, native_cudnn (requested by backend=) runs the call cpu float32 ")
    assert rest[0] == "flash2, native_cudnn:"
    assert "Backends that would run it: native, " in text
    assert rest[-1] == 'To fall back to native, write: backend=["flash2", "native_cudnn", "native"]'
    headings = [line for line in rest if line.endswith(":")]
    named = {name for heading in headings for name in heading.rstrip(":").split(", ")}
    assert named == {"flash2", "native_cudnn"}
    assert len(reasons_in(text)) == len(set(reasons_in(text))) > 0
    assert len(text.splitlines()) < 12


@pytest.mark.parametrize("backend", ["auto", ["auto"], ["flash2", "auto"], ["native_flash", "native_math"]])
def test_no_heading_is_empty_and_no_reason_stands_twice(backend: Any) -> None:
    lines = str(error_of(backend=backend, softcap=1.0, dropout_p=0.1)).splitlines()
    for line, after in zip(lines[1:], [*lines[2:], ""], strict=True):
        if line.endswith(":"):
            assert after.lstrip().startswith("- ")
    reasons = [line for line in lines if line.lstrip().startswith("- ")]
    assert len(reasons) == len(set(reasons))


def test_autos_error_leaves_out_what_auto_never_tries() -> None:
    text = str(error_of(backend="auto", softcap=1.0, dropout_p=0.1))
    assert "flash2_hub" not in text
    assert "flex" in text


@pytest.mark.parametrize(
    ("backend", "kind"), [("flash4", BackendUnavailableError), ("native_flash", UnsupportedCallError)]
)
def test_list_that_a_required_backends_error_names_runs(backend: str, kind: type[Exception]) -> None:
    error = error_of(backend=backend, dropout_p=0.5)
    assert isinstance(error, kind)
    spelled = re.search(r"backend=(\[.*\])", str(error))
    assert spelled is not None
    wanted = [name.strip('" ') for name in spelled[1].strip("[]").split(",")]
    assert wanted[0] == backend
    assert call(backend=wanted, dropout_p=0.5).shape == (1, 6, 2, 8)


def test_nothing_is_offered_where_nothing_would_run() -> None:
    text = str(error_of(backend="native_flash", softcap=1.0, dropout_p=0.1))
    assert "would run" not in text
    assert "No other backend runs it" in text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("backend=", 'backend=["flash4", "native"]'),
        ("model", 'anyattn.set_attention_backend(model, ["flash4", "native"])'),
        ("context", 'anyattn.attention_backend(["flash4", "native"])'),
        ("default", 'anyattn.set_default_backend(["flash4", "native"])'),
        ("ANYATTN_BACKEND", "ANYATTN_BACKEND=flash4,native"),
    ],
)
def test_list_is_spelled_as_the_wish_was(source: str, said: str) -> None:
    # The mask of HunyuanVideo's token refiner, under a required flash4.
    mask = MaskSpec(dense=DenseSpec("boolean", torch.bool, (1, 24, 256, 256)), dead_rows=True)
    spec = AttentionSpec(1, 256, 256, 24, 24, 128, 128, torch.bfloat16, "cuda", 0.1, mask=mask)
    env = preset("h100", packages={"flash-attn-4": "4.0.0b36"})
    decision = resolve(spec, env, Preference(("flash4",), "require", source), dict(known(names())))
    text = str(refusal(decision))
    assert "mask" in text
    assert text.endswith(said)


@pytest.mark.parametrize("backend", [name for name in registry.BUILTIN if not name.startswith("native")])
def test_what_a_laptop_lacks_is_said_once(backend: str) -> None:
    decision = anyattn.explain(*[torch.randn(1, 6, 2, 8)] * 3, env=preset("cpu"), backend=backend)
    codes = [reason.code for reason in decision.reasons(backend)]
    assert codes.count("no_device") <= 1
    assert not {"no_device", "device_type"} <= set(codes)


def test_device_that_is_there_and_not_the_tensors_is_named() -> None:
    decision = anyattn.explain(*[torch.randn(1, 6, 2, 8)] * 3, env=preset("h100"), backend="native_cudnn")
    assert [reason.code for reason in decision.reasons("native_cudnn")] == ["device_type"]


PINNED = {name for name in registry.BUILTIN if name not in ("flash3", "flash3_fp8") and registry.get(name).install}


@pytest.mark.parametrize("backend", sorted(PINNED))
def test_errors_and_doctor_name_one_command_to_install(backend: str) -> None:
    decision = anyattn.explain(*[torch.randn(1, 6, 2, 8)] * 3, env=preset("h100"), backend=backend)
    hints = [reason.hint for reason in decision.reasons(backend) if reason.code == "not_installed"]
    assert hints
    assert all(hint.startswith(registry.get(backend).install) for hint in hints)


def test_flash3s_commands_are_all_in_what_doctor_says() -> None:
    commands = {package.command for package in registry.get("flash3").packages}
    assert len(commands) == 2
    assert all(command in registry.get("flash3").install for command in commands)
