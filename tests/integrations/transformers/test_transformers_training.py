"""Gradient checkpointing and dropout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers_families import BY_NAME, GROUPED
from transformers_runs import BUDGET, error, gradients, inputs_of, switch, token_ids

import anyattn


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "gpt_oss", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_equal_eagers(name: str, reentrant: bool) -> None:
    family = BY_NAME[name]
    found = []
    for implementation in ("eager", "anyattn"):
        model = family.make().train()
        if implementation == "anyattn":
            switch(model, family)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        with anyattn.record() as calls:
            grads = gradients(model, *inputs_of(family, "right"))
        found.append(torch.cat([grad.flatten() for grad in grads.values()]))
    assert error(found[1], found[0]) <= 10 * BUDGET
    assert len(calls) > family.calls  # the layers ran again


def test_pin_holds_while_layers_run_again_in_the_backward() -> None:
    model = BY_NAME["llama"].make().train()
    anyattn.set_attention_backend(model, "native_math")
    model.activation_checkpointing_enable({"use_reentrant": False})
    with anyattn.record() as calls:
        gradients(model, *inputs_of(BY_NAME["llama"], "none"))
    assert {call.chosen for call in calls} == {"native_math"}
    assert len(calls) == 4


def test_dropout_is_applied_in_training_alone() -> None:
    family = dataclasses.replace(BY_NAME["llama"], arguments={**GROUPED, "attention_dropout": 0.5})
    model = family.make("anyattn")
    with torch.no_grad(), anyattn.record() as calls:
        assert torch.equal(model(token_ids()).logits, model(token_ids()).logits)
        model.train()
        assert not torch.allclose(model(token_ids()).logits, model(token_ids()).logits)
    assert [call.spec.dropout_p for call in calls] == [0.0] * 4 + [0.5] * 4


def test_backend_without_dropout_refuses_it() -> None:
    family = dataclasses.replace(BY_NAME["llama"], arguments={**GROUPED, "attention_dropout": 0.5})
    model = family.make("anyattn").train()
    with pytest.raises(anyattn.UnsupportedCallError, match="dropout"), anyattn.attention_backend("flex"):
        model(token_ids())
