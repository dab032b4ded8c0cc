"""How tensors lie in memory is said by one rule, in eager code and while torch.compile traces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyattn.call.storage import storage_facts
from anyattn.lowering.storage import starts_aligned


def lie(change: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = tensor(2, 6, 3, 16), tensor(2, 6, 3, 16), tensor(2, 6, 3, 16)
    dense = None
    if change == "start":
        q = tensor(2 * 6 * 3 * 16 + 1)[1:].view(2, 6, 3, 16)
    if change == "rows":
        k = tensor(2, 6, 3, 17)[..., :16]
    if change == "odd head_dim":
        q, k, v = tensor(2, 6, 3, 13), tensor(2, 6, 3, 13), tensor(2, 6, 3, 13)
    if change == "stride":
        v = tensor(2, 6, 16, 3).transpose(2, 3)
    if change == "heads":
        k = tensor(2, 6, 1, 16).expand(2, 6, 3, 16)
    if change in ("mask", "boolean mask"):
        dense = tensor(2, 1, 6, 7, dtype=torch.bool if change == "boolean mask" else torch.float16)[..., :6]
    return q, k, v, dense


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("none", (True, True, False, True)),
        ("start", (False, True, False, True)),
        ("rows", (False, True, False, True)),
        ("odd head_dim", (True, True, False, True)),
        ("stride", (False, False, False, True)),
        ("heads", (True, True, True, True)),
        ("mask", (True, True, False, False)),
        ("boolean mask", (True, True, False, True)),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_storage_is_read_by_one_rule(change: str, expected: tuple[bool, ...], traced: bool) -> None:
    torch._dynamo.reset()  # where memory starts is no guard: what was compiled for another start would run
    q, k, v, dense = lie(change)

    def read(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[bool, ...]]:
        return query + 1, storage_facts(query, key, value, 2, mask, starts_aligned)

    call = torch.compile(read, backend="eager", fullgraph=True, dynamic=False) if traced else read
    assert call(q, k, v, dense)[1] == expected
