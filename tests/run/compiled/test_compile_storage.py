"""Where tensors start in memory, in code that torch.compile traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from anyattn.lowering.storage import realigned, starts_aligned

_starts: list[int] = []


@torch.library.custom_op("anyattn_tests::where", mutates_args=())
def where(tensor: Tensor) -> Tensor:
    """Stand for a kernel that reads 16 bytes at a time, and note where its input starts."""
    _starts.append(tensor.data_ptr() % 16)
    return tensor.clone()


@where.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    _starts.clear()
    yield
    torch._dynamo.reset()


def _attend(tensor: Tensor) -> Tensor:
    return where(tensor if starts_aligned(tensor) else realigned(tensor))  # type: ignore[no-any-return]


STORAGE = torch.arange(1000.0)


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_inductor_keeps_the_copy_of_what_starts_off(dynamic: bool | None) -> None:
    run = torch.compile(_attend, fullgraph=True, dynamic=dynamic)
    for start, length in ((1, 64), (0, 64), (3, 10), (8, 65), (16, 10)):
        tensor = STORAGE[start : start + length]
        assert torch.equal(run(tensor), tensor)
    assert _starts == [0] * 5


def test_what_starts_where_it_should_is_not_copied() -> None:
    made = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        made.extend(node.target for node in graph.graph.nodes if "realign" in str(node.target))
        return graph.forward

    for start in (0, 8):
        torch.compile(_attend, fullgraph=True, backend=count)(STORAGE[start : start + 64])
    assert not made
    torch._dynamo.reset()
    torch.compile(_attend, fullgraph=True, backend=count)(STORAGE[2:66])
    assert len(made) == 1


def test_views_made_in_the_graph_are_seen_too() -> None:
    def attend_all(tensor: Tensor) -> list[Tensor]:
        twice = tensor * 2
        return [_attend(twice[start : start + 400].view(4, 100)) for start in (0, 1, 4, 7)]

    found = torch.compile(attend_all, fullgraph=True)(STORAGE)
    assert _starts == [0] * 4
    for start, result in zip((0, 1, 4, 7), found, strict=True):
        assert torch.equal(result.flatten(), STORAGE[start : start + 400] * 2)


def test_copy_has_a_gradient() -> None:
    leaf = torch.randn(65, requires_grad=True)
    run = torch.compile(lambda tensor: realigned(tensor[1:]) * 3, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(run(leaf).sum(), leaf)
    assert torch.equal(found, torch.cat((torch.zeros(1), torch.full((64,), 3.0))))
