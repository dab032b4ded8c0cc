"""What the version of torch decides: tried with made-up versions here, and with real ones by `make matrix`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor

import anyattn
from anyattn import environment, masks, reference
from anyattn.adapters.native import kernels
from anyattn.backend import needs
from anyattn.run import traced


@pytest.fixture
def equal_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the CPU flash kernel before torch 2.9, which reads past key and value where heads are shared."""
    entry = kernels._ENTRIES["flash_cpu"]

    def checked(spec: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, is_causal: bool) -> Any:
        assert key.shape[1] == value.shape[1] == query.shape[1]
        return entry(spec, query, key, value, mask, is_causal)

    monkeypatch.setitem(kernels._ENTRIES, "flash_cpu", checked)


@pytest.fixture(params=["2.8.0", "2.8.0+cpu", "2.9.0a0+git1234"])
def old_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    release = environment.preset("cpu", torch_version=request.param)
    with environment.supposed(release):
        anyattn.reset()
        yield


def _shared(heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 5, heads, 16), (2, 7, kv_heads, 16), (2, 7, kv_heads, 16))
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return query, key, value


CALLS: dict[str, dict[str, Any]] = {
    "lse": {"return_lse": True},
    "sinks": {"sinks": torch.linspace(-1, 1, 4, dtype=torch.float64)},
    "flash": {"backend": "native_flash"},
    "flash, causal": {"backend": "native_flash", "attn_mask": masks.Causal()},
    "flash, key mask": {"backend": "native_flash", "attn_mask": masks.KeyLengths(torch.tensor([7, 3]))},
}


@pytest.mark.usefixtures("equal_heads_alone", "old_torch")
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_shared_heads_are_repeated_for_the_cpu_kernel_of_old_torch(name: str, kv_heads: int) -> None:
    options = CALLS[name]
    tensors = [tensor.requires_grad_(name != "sinks") for tensor in _shared(kv_heads=kv_heads)]
    with anyattn.record() as calls:
        found = anyattn.attention(*tensors, enable_gqa=True, **options)
    assert "repeat_heads" in {conversion.code for conversion in calls[0].conversions}
    right, lse = reference.attention(*tensors, options.get("attn_mask"), sinks=options.get("sinks"))
    out = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(out, right)
    if isinstance(found, tuple):
        torch.testing.assert_close(found[1], lse.float())
    if name != "sinks":
        upstream = torch.randn_like(out)
        given, wanted = (torch.autograd.grad(output, tensors, upstream) for output in (out, right))
        for one, other in zip(given, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("equal_heads_alone", "old_torch")
def test_shared_heads_of_packed_sequences_are_repeated_too() -> None:
    query, key, value = (tensor.flatten(0, 1) for tensor in _shared())
    starts = [torch.tensor([0, length, 2 * length], dtype=torch.int32) for length in (5, 7)]
    out, _ = anyattn.attention_varlen(query, key, value, *starts, 5, 7, enable_gqa=True, return_lse=True)
    each = zip(query.split(5), key.split(7), value.split(7), strict=True)
    right = torch.cat([reference.attention(q[None], k[None], v[None])[0][0] for q, k, v in each])
    torch.testing.assert_close(out, right)


def test_shared_heads_are_not_repeated_where_the_kernel_takes_them() -> None:
    with environment.supposed(environment.preset("cpu", torch_version="2.9.0")):
        decision = anyattn.explain(*_shared(), enable_gqa=True, return_lse=True)
        assert decision.conversions == ()
    with environment.supposed(environment.preset("cpu", torch_version="2.8.0")):
        equal = anyattn.explain(*_shared(kv_heads=4), return_lse=True)
        assert equal.conversions == ()
        plain = anyattn.explain(*_shared(), enable_gqa=True)
        assert plain.conversions == ()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_calls_of_too_old_a_torch_are_refused_with_the_version_needed(fullgraph: bool) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda q: anyattn.attention(q, q, q), fullgraph=fullgraph, backend="eager")
    query = _shared()[0]
    with (
        environment.supposed(environment.preset("cpu", torch_version="2.7.1")),
        pytest.raises(Exception, match=r"need torch 2\.8 or newer; this is torch 2\.7\.1"),
    ):
        run(query)
    torch._dynamo.reset()


def test_the_floor_in_the_metadata_is_the_one_that_is_checked() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (asked,) = (Requirement(text) for text in project["dependencies"] if text.startswith("torch"))
    assert str(asked.specifier) == f">={traced._SINCE}"
    assert f"torch {asked.specifier}" == needs.TORCH
