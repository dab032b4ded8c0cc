"""The public names and their signatures, against a golden file: a change of either is a decision."""

from __future__ import annotations

import inspect
import os
import typing
from pathlib import Path

import pytest

import anyattn
from anyattn import masks

GOLDEN = Path(__file__).with_name("public_api.txt")


def _describe(owner: str, name: str, thing: object) -> str:
    if inspect.isclass(thing):
        members = [m for m in vars(thing) if not m.startswith("_")]
        bases = ", ".join(base.__name__ for base in thing.__bases__)
        signature = "" if issubclass(thing, Exception) else inspect.signature(thing)
        return f"{owner}{name}({bases}){signature}: {', '.join(sorted(members))}"
    if inspect.isfunction(thing):
        return f"{owner}{name}{inspect.signature(thing)}"
    return f"{owner}{name}"


def test_public_interface_is_the_golden_one() -> None:
    lines = [_describe("", name, getattr(anyattn, name)) for name in sorted(anyattn.__all__) if name != "__version__"]
    lines += [_describe("masks.", name, getattr(masks, name)) for name in sorted(masks.__all__)]
    found = "\n".join(lines) + "\n"
    if os.environ.get("ANYATTN_WRITE_GOLDEN"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text(), "write it anew with ANYATTN_WRITE_GOLDEN=1 if the change is meant"


def test_every_public_name_has_a_docstring() -> None:
    for name in anyattn.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(anyattn, name)), name


@pytest.mark.parametrize("name", ["attention", "scaled_dot_product_attention", "attention_varlen"])
def test_result_is_typed_by_return_lse_and_overloads_keep_every_parameter(name: str) -> None:
    call = getattr(anyattn, name)
    found = {}
    plain = inspect.signature(call)
    for overload in typing.get_overloads(call):
        signature = inspect.signature(overload)
        assert list(signature.parameters) == list(plain.parameters)
        for parameter, own in zip(signature.parameters.values(), plain.parameters.values(), strict=True):
            if own.name != "return_lse":
                assert parameter.annotation == own.annotation
                assert (parameter.default is parameter.empty) == (own.default is own.empty)
        found[signature.parameters["return_lse"].annotation] = signature.return_annotation
    pair = "tuple[Tensor, Tensor]"
    assert found == {"Literal[False]": "Tensor", "Literal[True]": pair, "bool": f"Tensor | {pair}"}
