"""What enabling changes, that all of it is undone, and how models get the name."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import masking_utils, modeling_utils
from transformers_families import BART, BY_NAME, IMAGE, PLAIN
from transformers_runs import token_ids

import anyattn
from anyattn.integrations import transformers as integration
from anyattn.integrations.transformers import state, versions


def snapshot() -> tuple[Any, ...]:
    """Everything of Transformers that the integration may touch."""
    model = modeling_utils.PreTrainedModel
    return (
        dict(modeling_utils.AttentionInterface._global_mapping),
        dict(masking_utils.AttentionMaskInterface._global_mapping),
        sorted((name, id(value)) for name, value in vars(model).items() if not name.startswith("_can_set")),
    )


@pytest.fixture
def before() -> tuple[Any, ...]:
    integration.disable()
    return snapshot()


def test_enabling_is_undone_exactly(before: tuple[Any, ...]) -> None:
    integration.enable()
    changed = snapshot()
    integration.enable()
    assert snapshot() == changed != before
    assert integration.is_enabled()
    integration.disable()
    integration.disable()
    assert snapshot() == before
    assert not integration.is_enabled()


def test_block_is_undone_after_an_exception(before: tuple[Any, ...]) -> None:
    def fail() -> None:
        with integration.enabled():
            assert integration.is_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert snapshot() == before


def test_block_inside_an_enabled_process_leaves_it_enabled() -> None:
    with integration.enabled():
        pass
    assert integration.is_enabled()


def test_failure_on_the_way_changes_nothing(before: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.integrations.transformers import hooks

    def fail(undo: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(hooks, "install", fail)
    with pytest.raises(RuntimeError, match="no"):
        integration.enable()
    assert snapshot() == before
    assert not integration.is_enabled()


def test_name_of_another_package_is_left_alone(before: tuple[Any, ...]) -> None:
    table = masking_utils.AttentionMaskInterface._global_mapping
    table["anyattn"] = len
    try:
        with pytest.raises(integration.UnsupportedVersionError, match="Another package"):
            integration.enable()
        assert table["anyattn"] is len
    finally:
        del table["anyattn"]
    assert snapshot() == before


@pytest.mark.parametrize("version", ["4.57.1", "5.22.0", "6.0.0", "5.24.0.dev0"])
def test_unknown_versions_are_refused(version: str, before: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(integration.UnsupportedVersionError, match="pip install"):
        integration.enable()
    assert snapshot() == before


def test_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    integration.disable()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(integration.UnsupportedVersionError, match="none is installed"):
        integration.enable()


@pytest.mark.parametrize("path", versions.SIGNATURES)
def test_missing_function_is_refused(path: str, before: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions.find
    monkeypatch.setattr(versions, "find", lambda wanted: None if wanted == path else found(wanted))
    with pytest.raises(integration.UnsupportedVersionError, match=path.replace(".", r"\.")):
        state.enable()
    assert snapshot() == before


def test_models_without_the_name_compute_what_they_did(before: tuple[Any, ...]) -> None:
    model = BY_NAME["llama"].make("sdpa")
    with torch.no_grad():
        want = model(token_ids()).logits
        integration.enable()
        with anyattn.record() as calls:
            assert torch.equal(model(token_ids()).logits, want)
    assert calls == []


def test_name_is_refused_by_transformers_until_enabled() -> None:
    integration.disable()
    with pytest.raises(ValueError, match="anyattn"):
        BY_NAME["llama"].make("anyattn")


@pytest.mark.parametrize("give", ["from_config", "from_pretrained", "set", "config"])
def test_name_is_given_in_every_way(give: str, tmp_path: Path) -> None:
    config = BY_NAME["llama"].make_config()
    if give == "from_config":
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="anyattn")
    elif give == "config":
        config._attn_implementation = "anyattn"
        model = hf.AutoModelForCausalLM.from_config(config)
    else:
        BY_NAME["llama"].make().save_pretrained(tmp_path)
        rest = {"attn_implementation": "anyattn"} if give == "from_pretrained" else {}
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **rest)
        if give == "set":
            model.set_attn_implementation("anyattn")
    with torch.no_grad(), anyattn.record() as calls:
        model(token_ids())
    assert len(calls) == 2


def test_saved_model_doesnt_hold_the_name(tmp_path: Path) -> None:
    model = BY_NAME["llama"].make("anyattn")
    with torch.no_grad():
        want = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    assert "anyattn" not in (tmp_path / "config.json").read_text()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="anyattn")
    with torch.no_grad(), anyattn.record() as calls:
        assert torch.equal(again(token_ids()).logits, want)
    assert len(calls) == 2
    integration.disable()
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def clip_calls(model: Any) -> list[int]:
    from transformers_runs import inputs_of

    with torch.no_grad(), anyattn.record() as calls:
        model(**inputs_of(BY_NAME["clip"], "none")[0])
    return [call.spec.seqlen_q for call in calls]


def test_dict_names_sub_configs() -> None:
    family = BY_NAME["clip"]
    assert clip_calls(family.make({"text_config": "anyattn", "vision_config": "eager"})) == [7, 7]
    model = family.make()
    model.set_attn_implementation({"vision_config": "anyattn"})
    assert clip_calls(model) == [17, 17]
    model.set_attn_implementation("anyattn")
    assert sorted(clip_calls(model)) == [7, 7, 17, 17]


def test_unknown_sub_config_is_refused() -> None:
    model = BY_NAME["clip"].make()
    with pytest.raises(anyattn.InvalidCallError, match=r"'vision_cfg'.*vision_config"):
        model.set_attn_implementation({"vision_cfg": "anyattn"})
    assert clip_calls(model) == []


NEVER_ASK = {
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "GPTJForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "DebertaModel": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
}


@pytest.mark.parametrize("name", NEVER_ASK)
def test_models_that_never_ask_are_refused(name: str) -> None:
    kind = getattr(hf, name)

    def config() -> Any:
        return kind.config_class(vocab_size=48, **NEVER_ASK[name])

    with pytest.raises(anyattn.InvalidCallError, match="never looks"):
        kind._from_config(config(), attn_implementation="anyattn")
    model = kind(config())
    used = model.config._attn_implementation
    with pytest.raises(anyattn.InvalidCallError, match="never looks"):
        model.set_attn_implementation("anyattn")
    with pytest.raises(anyattn.InvalidCallError, match="would change nothing"):
        anyattn.set_attention_backend(model, "auto")
    assert model.config._attn_implementation == used


MIXED = {
    "PegasusXForConditionalGeneration": BART,
    "GitForCausalLM": {**PLAIN, "vision_config": IMAGE},
    "BigBirdPegasusForConditionalGeneration": BART,
}


@pytest.mark.parametrize("name", MIXED)
def test_models_whose_own_layers_may_misread_masks_are_refused(name: str) -> None:
    kind = getattr(hf, name)
    model = kind._from_config(kind.config_class(**MIXED[name]), attn_implementation="eager")
    with pytest.raises(anyattn.InvalidCallError, match="may misread the masks"):
        model.set_attn_implementation("anyattn")
    with pytest.raises(anyattn.InvalidCallError, match=r"would change nothing.*may misread the masks"):
        anyattn.set_attention_backend(model, "auto")
    assert model.config._attn_implementation == "eager"


def test_disabled_model_doesnt_run_silently() -> None:
    model = BY_NAME["llama"].make("anyattn")
    integration.disable()
    with pytest.raises(KeyError, match="anyattn"):
        model(token_ids())
    integration.enable()
    model(token_ids())


def test_importing_the_integration_imports_no_transformers() -> None:
    code = "import sys; import anyattn.integrations.transformers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
