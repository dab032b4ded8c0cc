"""Prefill and decoding under torch.compile, in one graph each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch._dynamo.testing import CompileCounter
from transformers_families import BY_NAME
from transformers_runs import BUDGET, error, switch, token_ids

import anyattn


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model: Any, step: Any) -> torch.Tensor:
    """Prefill six tokens into a static cache, and decode three with a compiled step."""
    cache = hf.StaticCache(config=model.config, max_cache_len=16)
    ids = token_ids(1)
    with torch.no_grad():
        out = [model(ids[:, :6], past_key_values=cache).logits]
        for place in range(6, 9):
            out.append(step(ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_decoding_with_a_static_cache_is_one_graph(name: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    want = decode(model, model)
    switch(model, family)
    graphs = CompileCounter()
    got = decode(model, torch.compile(model, fullgraph=True, backend=graphs))
    assert error(got, want) <= BUDGET
    assert graphs.frame_count <= 2  # at most one more than for a step of the model itself


def test_decoding_of_a_pinned_model_is_compiled() -> None:
    family = BY_NAME["llama"]
    model = family.make()
    want = decode(model, model)
    anyattn.set_attention_backend(model, "native_math")
    got = decode(model, torch.compile(model, fullgraph=True, backend="eager"))
    assert error(got, want) <= BUDGET


@pytest.mark.parametrize("name", ["llama", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_forward_is_one_graph(name: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    step = torch.compile(model, fullgraph=True, backend="eager")
    given: dict[str, Any] = {} if name == "bert" else {"use_cache": False}
    for length in (9, 11):
        ids = token_ids(2, length)
        if name == "t5":
            given["decoder_input_ids"] = ids
        with torch.no_grad():
            model.set_attn_implementation("eager")
            want = model(ids, **given)[0]
            model.set_attn_implementation("anyattn")
            assert error(step(ids, **given)[0], want) <= BUDGET


def test_compiled_training_step_equals_eagers() -> None:
    family = BY_NAME["llama"]
    model = family.make().train()
    found = []
    for implementation in ("eager", "anyattn"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        step = model if implementation == "eager" else torch.compile(model, fullgraph=True, backend="aot_eager")
        step(token_ids(), use_cache=False).logits.square().sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert error(found[1], found[0]) <= 10 * BUDGET
