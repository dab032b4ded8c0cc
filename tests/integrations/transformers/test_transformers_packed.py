"""Packed sequences: each sees itself alone, by positions that start again or by cumulative lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers_families import BY_NAME
from transformers_runs import BUDGET, error, switch, token_ids

import anyattn

CUTS = ((0, 3), (3, 7), (7, 9))
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
STARTS = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
LENGTHS = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 4, "max_length_k": 4}
PACKED = ["llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "cohere2", "phi3"]
WAYS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": POSITIONS, "use_cache": False},
    "positions and a cache": {"position_ids": POSITIONS},
    "positions and a mask of ones": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(POSITIONS)},
    "lengths": {**LENGTHS, "position_ids": POSITIONS},
    "lengths without maxima": {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "position_ids": POSITIONS},
    "lengths and plain positions": {**LENGTHS, "use_cache": False},
}


def one_by_one(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(ids[:, start:stop], use_cache=False).logits for start, stop in CUTS], 1)


# Llama4's layers don't pass position_ids on, so beside a cache they compute what they do with eager.
REACHED = [(name, way) for name in PACKED for way in WAYS]
REACHED += [("llama4", way) for way in WAYS if "and a" not in way]


@pytest.mark.parametrize(("name", "way"), REACHED)
def test_packed_sequences_equal_single_ones(name: str, way: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    want = one_by_one(model, token_ids(1))
    switch(model, family)
    with torch.no_grad(), anyattn.record() as calls:
        got = model(token_ids(1), **WAYS[way]).logits
    assert error(got, want) <= BUDGET
    assert all(call.spec.packed for call in calls) == (name != "llama4")


def test_comparison_fails_where_sequences_see_each_other() -> None:
    model = BY_NAME["llama"].make()
    want = one_by_one(model, token_ids(1))
    with torch.no_grad():
        assert error(model(token_ids(1), position_ids=POSITIONS).logits, want) > 0.1  # eager, with a cache


def test_packed_rows_of_a_batch_equal_eagers() -> None:
    model = BY_NAME["mistral"].make()
    given = {
        "input_ids": token_ids(),
        "position_ids": torch.cat([POSITIONS, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])]),
    }
    with torch.no_grad():
        want = model(**given, use_cache=False).logits
        model.set_attn_implementation("anyattn")
        for use_cache in (False, True):
            assert error(model(**given, use_cache=use_cache).logits, want) <= BUDGET


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_gradients_of_packed_sequences_equal_eagers(name: str) -> None:
    model = BY_NAME[name].make()
    found = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = [model(token_ids(1)[:, a:b], use_cache=False).logits for a, b in CUTS]
        out = torch.cat(logits, 1) if implementation == "eager" else model(token_ids(1), position_ids=POSITIONS).logits
        (out * torch.arange(out.numel()).view(out.shape).remainder(7)).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert error(found[1], found[0]) <= 10 * BUDGET


def test_one_of_the_lengths_is_refused() -> None:
    model = BY_NAME["llama"].make("anyattn")
    with pytest.raises(anyattn.InvalidCallError, match="belong together"):
        model(token_ids(1), cu_seq_lens_q=STARTS)


def test_positions_that_only_jump_are_no_packed_sequences() -> None:
    model = BY_NAME["llama"].make()
    positions = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 11, 12]])
    with torch.no_grad():
        want = model(token_ids(1), position_ids=positions).logits
        model.set_attn_implementation("anyattn")
        assert error(model(token_ids(1), position_ids=positions).logits, want) <= BUDGET
