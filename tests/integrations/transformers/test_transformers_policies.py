"""Policies on models of Transformers: which layers rules select, what is switched, and how it is undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers_families import BY_NAME
from transformers_runs import token_ids

import anyattn
from anyattn import InvalidCallError, Policy, Rule
from anyattn.integrations import transformers as integration
from anyattn.pins import covering


@pytest.fixture(autouse=True)
def _as_before():
    integration.disable()
    yield
    integration.disable()


def decided(model: Any, **inputs: Any) -> list[tuple[str | None, str]]:
    with torch.no_grad(), anyattn.record() as calls:
        model(token_ids(), **inputs)
    return [(call.chosen, call.preference.source) for call in calls]


def is_covered(model: torch.nn.Module) -> bool:
    return any(covering.is_covered(part) for part in model.modules())


def test_layers_are_selected_the_model_is_switched_and_reset_is_exact() -> None:
    model = BY_NAME["llama"].make("sdpa")
    report = anyattn.set_attention_backend(model, Policy([Rule("last", "native_math", role="self", layers="-1")]))
    assert decided(model) == [("native", "built-in"), ("native_math", "policy rule 'last'")]
    assert report.shares[0].layers == ("model.layers.1.self_attn",)
    assert model.config._attn_implementation == "anyattn"
    anyattn.reset_attention_backend(model)
    assert (model.config._attn_implementation, is_covered(model), decided(model)) == ("sdpa", False, [])
    with pytest.raises(InvalidCallError, match="no backend"):
        anyattn.reset_attention_backend(model)


def test_cross_attention_of_an_encoder_decoder_is_told_apart() -> None:
    model = BY_NAME["t5"].make("sdpa")
    policy = Policy([Rule("cross", "native_math", role="cross"), Rule("self", "native", role="self")])
    report = anyattn.set_attention_backend(model, policy)
    cross, own = report.shares
    assert cross.layers
    assert all("EncDecAttention" in name for name in cross.layers)
    assert len(own.layers) + len(cross.layers) == own.total
    found = decided(model, decoder_input_ids=token_ids())
    assert {source: backend for backend, source in found} == {
        "policy rule 'cross'": "native_math",
        "policy rule 'self'": "native",
    }
    anyattn.reset_attention_backend(model)


def test_text_encoder_has_its_role_by_its_class() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=20, **sizes))
    anyattn.set_attention_backend(model, Policy([Rule("text", "native_math", role="text_encoder")]))
    with torch.no_grad(), anyattn.record() as calls:
        model(torch.tensor([[1, 2, 3]]))
    assert [call.preference.source for call in calls] == ["policy rule 'text'"] * 2
    anyattn.reset_attention_backend(model)
    with pytest.raises(InvalidCallError, match=r"2 layers \(2 text_encoder\)"):
        anyattn.set_attention_backend(model, Policy([Rule("self", "auto", role="self")]))


def test_refused_policy_leaves_model_and_integration_as_they_were() -> None:
    model = BY_NAME["llama"].make("sdpa")
    for rules in ([Rule("vae", "auto", role="vae")], [Rule("vae", "auto", role="vae", optional=True)]):
        with pytest.raises(InvalidCallError, match="Nothing was changed"):
            anyattn.set_attention_backend(model, Policy(rules))
        assert model.config._attn_implementation == "sdpa"
        assert not integration.is_enabled()
        assert not is_covered(model)


def test_pin_and_policy_on_one_model_are_undone_together_in_either_order() -> None:
    for order in (0, 1):
        model = BY_NAME["llama"].make("sdpa")
        policy = Policy([Rule("last", "native_math", layers="-1")])
        if order:
            anyattn.set_attention_backend(model, policy)
        anyattn.set_attention_backend(model, "native")
        if not order:
            anyattn.set_attention_backend(model, policy)
            assert decided(model) == [("native", "model"), ("native_math", "policy rule 'last'")]
        anyattn.reset_attention_backend(model)
        assert model.config._attn_implementation == "sdpa"
        assert not is_covered(model)


def test_copy_keeps_the_policy_and_disabling_takes_it_away() -> None:
    model = BY_NAME["llama"].make("sdpa")
    anyattn.set_attention_backend(model, Policy([Rule("all", "native_math")]))
    twin = copy.deepcopy(model)
    anyattn.reset_attention_backend(model)
    assert decided(twin) == [("native_math", "policy rule 'all'")] * 2
    anyattn.reset_attention_backend(twin)
    assert not is_covered(twin)
    anyattn.set_attention_backend(model, Policy([Rule("all", "native_math")]))
    integration.disable()
    assert (model.config._attn_implementation, is_covered(model)) == ("sdpa", False)


def test_generated_tokens_are_the_same_and_every_call_follows_its_rule() -> None:
    model = BY_NAME["llama"].make("eager")
    arguments = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(token_ids(), **arguments)
    anyattn.set_attention_backend(model, Policy([Rule("first", "native_math", layers="0"), Rule("rest", "auto")]))
    with anyattn.record() as calls:
        found = model.generate(token_ids(), **arguments)
    assert torch.equal(found, want)
    sources = [call.preference.source for call in calls]
    assert sources == ["policy rule 'first'", "policy rule 'rest'"] * 5
    anyattn.reset_attention_backend(model)


def test_implementation_that_is_changed_afterwards_is_warned_of_with_the_rules_backends() -> None:
    model = BY_NAME["llama"].make("sdpa")
    policy = Policy([Rule("middle", "flex", steps="1:"), Rule("rest", "native_math")])
    anyattn.set_attention_backend(model, policy)
    model.set_attn_implementation("eager")
    with anyattn.denoising_step(0, 2), pytest.warns(anyattn.AnyattnWarning, match=r"A backend \(flex; native_math\)"):
        assert decided(model) == []
