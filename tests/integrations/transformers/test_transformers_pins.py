"""A backend pinned to a model of Transformers is in force in its layers, and never said to be where it isn't."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers_families import BY_NAME
from transformers_runs import inputs_of, token_ids

import anyattn
from anyattn.integrations import transformers as integration
from anyattn.pins import pins


def chosen(model: Any) -> list[str | None]:
    with torch.no_grad(), anyattn.record() as calls:
        model(token_ids())
    return [call.chosen for call in calls]


@pytest.mark.parametrize("backend", ["flex", "native_math", ["flash2", "native_math"], "auto"])
def test_pin_switches_the_model_and_decides(backend: Any) -> None:
    integration.disable()
    model = BY_NAME["llama"].make("sdpa")
    report = anyattn.set_attention_backend(model, backend)
    want = {"flex": "flex", "auto": "native"}.get(str(backend), "native_math")
    assert chosen(model) == [want, want]
    assert (report.layers, report.switched, report.left) == (2, ("sdpa",), ())
    assert "switched from attn_implementation 'sdpa' to 'anyattn'" in str(report)
    anyattn.reset_attention_backend(model)
    assert model.config._attn_implementation == "sdpa"
    assert chosen(model) == []


def test_pin_leaves_a_name_that_was_given_by_hand() -> None:
    model = BY_NAME["llama"].make("anyattn")
    report = anyattn.set_attention_backend(model, "flex")
    assert report.switched == ()
    anyattn.reset_attention_backend(model)
    assert model.config._attn_implementation == "anyattn"
    assert chosen(model) == ["native", "native"]


def test_reset_of_a_model_without_a_pin_is_refused() -> None:
    with pytest.raises(anyattn.InvalidCallError, match="no backend of its own"):
        anyattn.reset_attention_backend(BY_NAME["llama"].make())


def test_pins_of_parts_beat_the_models() -> None:
    model = BY_NAME["llama"].make("anyattn")
    anyattn.set_attention_backend(model.model.layers[1], "native_math")
    anyattn.set_attention_backend(model, "flex")
    assert chosen(model) == ["flex", "native_math"]
    anyattn.reset_attention_backend(model)
    assert chosen(model) == ["native", "native_math"]


def test_part_of_a_model_with_another_implementation_is_refused() -> None:
    model = BY_NAME["llama"].make()
    with pytest.raises(anyattn.InvalidCallError, match=r"'eager'.*Nothing was changed.*set_attn_implementation"):
        anyattn.set_attention_backend(model.model.layers[1], "flex")
    assert model.config._attn_implementation == "eager"
    assert pins.pin_of(model.model.layers[1]) is None


def test_pin_whose_model_is_switched_away_says_so() -> None:
    model = BY_NAME["llama"].make()
    anyattn.set_attention_backend(model, "native_math")
    model.set_attn_implementation("eager")
    assert pins.pin_of(model) is None
    with pytest.warns(anyattn.AnyattnWarning, match="changed to 'eager'"):
        assert chosen(model) == []
    assert chosen(model) == []  # said once
    model.set_attn_implementation("anyattn")
    assert chosen(model) == ["native_math", "native_math"]


def test_implementation_that_was_set_after_the_pin_stays() -> None:
    model = BY_NAME["llama"].make()
    anyattn.set_attention_backend(model, "native_math")
    model.set_attn_implementation("sdpa")
    anyattn.reset_attention_backend(model)
    assert model.config._attn_implementation == "sdpa"


def test_unknown_backend_changes_nothing() -> None:
    model = BY_NAME["llama"].make()
    with pytest.raises(anyattn.UnknownBackendError):
        anyattn.set_attention_backend(model, "flax")
    assert model.config._attn_implementation == "eager"


def test_disabling_takes_pins_and_switches_back() -> None:
    model = BY_NAME["llama"].make()
    anyattn.set_attention_backend(model, "native_math")
    integration.disable()
    assert model.config._attn_implementation == "eager"
    assert type(model).__mro__[0].__module__.startswith("transformers.")
    assert chosen(model) == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_the_pin(how: str) -> None:
    model = BY_NAME["llama"].make()
    anyattn.set_attention_backend(model, "native_math")
    made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    anyattn.reset_attention_backend(model)
    assert chosen(made) == ["native_math", "native_math"]
    assert chosen(model) == []


def test_two_pins_that_share_a_config_put_it_back_with_the_last() -> None:
    model = BY_NAME["llama"].make()
    anyattn.set_attention_backend(model, "flex")
    anyattn.set_attention_backend(model.model, "native_math")
    anyattn.reset_attention_backend(model)
    assert chosen(model) == ["native_math", "native_math"]
    anyattn.reset_attention_backend(model.model)
    assert model.config._attn_implementation == "eager"


def test_block_decides_where_no_pin_does_and_overrides_if_asked() -> None:
    model = BY_NAME["llama"].make("anyattn")
    with anyattn.attention_backend("native_math"):
        assert chosen(model) == ["native_math", "native_math"]
    anyattn.set_attention_backend(model, "native")
    with anyattn.attention_backend("native_math", override=True):
        assert chosen(model) == ["native_math", "native_math"]


def test_pin_holds_in_other_threads() -> None:
    model = BY_NAME["llama"].make()
    anyattn.set_attention_backend(model, "native_math")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(chosen(model)))
    thread.start()
    thread.join()
    assert found == ["native_math", "native_math"]


def test_composite_models_are_switched_with_all_parts() -> None:
    model = BY_NAME["clip"].make("sdpa")
    report = anyattn.set_attention_backend(model, "native_math")
    with torch.no_grad(), anyattn.record() as calls:
        model(**inputs_of(BY_NAME["clip"], "none")[0])
    assert [call.chosen for call in calls] == ["native_math"] * 4
    assert report.layers == 4
    anyattn.reset_attention_backend(model)
    assert model.text_model.config._attn_implementation == model.config._attn_implementation == "sdpa"


def test_module_around_a_model_is_handled() -> None:
    model = BY_NAME["llama"].make()
    around = nn.Sequential(model)
    report = anyattn.set_attention_backend(around, "native_math")
    assert report.layers == 2
    assert chosen(model) == ["native_math", "native_math"]


def test_refusal_names_the_layer() -> None:
    model = BY_NAME["gemma2"].make()
    anyattn.set_attention_backend(model, "native")
    with pytest.raises(anyattn.UnsupportedCallError, match=r"softcap[\s\S]*layers\.0\.self_attn"):
        chosen(model)


def test_list_of_layers_says_what_is_reached() -> None:
    model = BY_NAME["llama"].make()
    assert {layer.reason for layer in integration.attention_layers(model)} == {"its attn_implementation is 'eager'"}
    model.set_attn_implementation("anyattn")
    assert [layer.reached for layer in integration.attention_layers(model)] == [True, True]
