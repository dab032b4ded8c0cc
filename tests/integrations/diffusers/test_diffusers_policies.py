"""Policies on pipelines of Diffusers: roles and layers of real models, what is changed, and how it is undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers_policies import by_step, demo, hunyuan_video, rules_by_step
from diffusers_tiny import make, output
from test_diffusers_pipelines import sdxl

import anyattn
from anyattn import AnyattnWarning, InvalidCallError, Policy, Rule
from anyattn.integrations import diffusers as integration
from anyattn.integrations import transformers
from anyattn.pins import covering

MIDDLE = Policy(
    [
        Rule("middle", "native_math", role="self", steps="1:-1"),
        Rule("cross", ["native_math"], role="cross", optional=True),
        Rule("vae", ["native"], role="vae"),
        Rule("rest", "auto"),
    ]
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    integration.disable()
    transformers.disable()


def state(pipeline: Any) -> list[Any]:
    """Everything that a policy might leave behind on a pipeline, its class, its modules and its schedulers."""
    found: list[Any] = [sorted(vars(pipeline)), type(pipeline), dict(vars(type(pipeline)))]
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            found += [(type(one), sorted(vars(one))) for one in part.modules()]
        elif part is not None:
            found += [type(part), dict(vars(type(part))), {**vars(part)}.keys()]
    return found


@pytest.mark.parametrize(
    ("name", "first", "middle"),
    [
        ("flux", {"rest"}, {"middle"}),
        ("sd3", {"rest"}, {"middle"}),
        ("wan", {"rest", "cross"}, {"middle", "cross"}),
        ("sdxl", {"rest", "cross"}, {"middle", "cross"}),
        ("qwen_image", {"rest"}, {"middle"}),
    ],
)
def test_record_names_the_rule_of_each_layer_at_each_step_and_reset_is_exact(
    name: str, first: set[str], middle: set[str]
) -> None:
    built = demo(name)
    want, before = built.run(), state(built.pipeline)
    anyattn.set_attention_backend(built.pipeline, MIDDLE)
    steps = by_step(built.arguments, built.pipeline)
    assert [set(step.values()) for step in steps] == [first, middle, middle, first, {"vae"}]
    assert {layer: rule for layer, rule in steps[1].items() if rule == "cross"} == {
        layer: rule for layer, rule in steps[0].items() if rule == "cross"
    }
    anyattn.reset_attention_backend(built.pipeline)
    assert state(built.pipeline) == before
    assert not integration.is_enabled()
    assert torch.equal(built.run().latents, want.latents)
    with pytest.raises(InvalidCallError, match="No backend was set"):
        anyattn.reset_attention_backend(built.pipeline)


def test_roles_of_joint_single_and_refiner_layers() -> None:
    built = demo("flux")
    anyattn.set_attention_backend(
        built.pipeline, Policy([Rule("joint", "native_math", role="joint"), Rule("self", "native", role="self")])
    )
    assert by_step(built.arguments, built.pipeline)[0] == {
        "transformer_blocks.0.attn": "joint",
        "single_transformer_blocks.0.attn": "self",
    }


def test_second_self_attention_of_sd35_is_not_cross_attention() -> None:
    model, _ = make("sd3")
    report = anyattn.set_attention_backend(model, Policy([Rule("self", "native", role="self")]))
    assert "transformer_blocks.0.attn2" in report.shares[0].layers
    assert report.left == ()


def test_layers_of_a_unet_are_counted_in_the_order_in_which_they_run() -> None:
    built = demo("sdxl")
    anyattn.set_attention_backend(built.pipeline, Policy([Rule("self", "native", role="self")]))
    ran = list(by_step(built.arguments, built.pipeline)[0])
    report = anyattn.set_attention_backend(built.pipeline, Policy([Rule("all", "native", role="self")]))
    assert list(report.shares[0].layers) == ran
    assert [name.partition(".")[0] for name in ran] == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]


def test_names_may_start_with_the_component_and_layers_are_counted_in_each() -> None:
    built = demo("wan")
    policy = Policy(
        [
            Rule("vae", "native", modules="vae"),
            Rule("last", "native_math", modules="transformer.blocks.*", layers="-1"),
            Rule("first", "native_math", modules=["blocks.0", "nothing"]),
        ]
    )
    anyattn.set_attention_backend(built.pipeline, policy)
    steps = by_step(built.arguments, built.pipeline)
    assert steps[0] == {"blocks.0.attn1": "first", "blocks.0.attn2": "first", "blocks.1.attn2": "last"}
    assert set(steps[-1].values()) == {"vae"}


def test_rule_without_selectors_selects_every_component_text_encoders_too() -> None:
    pipe = sdxl()
    assert pipe.text_encoder_2.config._attn_implementation == "sdpa"
    report = anyattn.set_attention_backend(
        pipe, Policy([Rule("text", "native_math", role="text_encoder"), Rule("rest", "auto")])
    )
    assert {(share.rule, share.component) for share in report.shares} == {
        ("text", "text_encoder_2 (CLIPTextModel)"),
        ("rest", "vae (AutoencoderKL)"),
        ("rest", "unet (UNet2DConditionModel)"),
    }
    with torch.no_grad(), anyattn.record() as calls:
        pipe.text_encoder_2(torch.tensor([[1, 2, 3]]))
    assert [(call.chosen, call.preference.source) for call in calls] == [("native_math", "policy rule 'text'")]
    anyattn.reset_attention_backend(pipe)
    assert pipe.text_encoder_2.config._attn_implementation == "sdpa"


def test_component_that_no_rule_selects_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sdxl()
    monkeypatch.setattr(transformers.state, "enable", lambda: pytest.fail("the text encoder was looked into"))
    before = [(type(one), sorted(vars(one))) for part in (pipe.vae, pipe.text_encoder_2) for one in part.modules()]
    anyattn.set_attention_backend(pipe, Policy([Rule("self", "native", role="self")]))
    assert before == [
        (type(one), sorted(vars(one))) for part in (pipe.vae, pipe.text_encoder_2) for one in part.modules()
    ]
    assert pipe.text_encoder_2.config._attn_implementation == "sdpa"
    assert not transformers.is_enabled()


def test_refused_policy_changes_nothing() -> None:
    pipe = sdxl()
    before = state(pipe)
    for rules in ([Rule("joint", "auto", role="joint")], [Rule("all", "auto"), Rule("late", "auto", steps="1:")]):
        with pytest.raises(InvalidCallError, match="Nothing was changed"):
            anyattn.set_attention_backend(pipe, Policy(rules))
        assert state(pipe) == before
        assert not integration.is_enabled()
        assert not transformers.is_enabled()
    with pytest.raises(InvalidCallError, match=r"unet \(UNet2DConditionModel\): \d+ layers \(\d+ self, \d+ cross\)"):
        anyattn.set_attention_backend(pipe, Policy([Rule("joint", "auto", role="joint")]))


def test_layers_that_are_not_reached_are_named() -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model, _ = make("unet")
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(
        InvalidCallError, match=r"'all' selects \d+ attention layers .* reaches none of them: it computes"
    ):
        anyattn.set_attention_backend(model, Policy([Rule("all", "native")]))
    names = list(model.attn_processors)
    model.set_attn_processor({name: AttnProcessor2_0() if name != names[0] else AttnProcessor() for name in names})
    with pytest.warns(
        AnyattnWarning, match=f"doesn't reach: UNet2DConditionModel: {names[0].removesuffix('.processor')}"
    ):
        report = anyattn.set_attention_backend(model, Policy([Rule("all", "native_math")]))
    assert len(report.unreached) == 1


def test_processor_that_is_exchanged_for_one_out_of_reach_is_warned_of() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = make("unet")
    anyattn.set_attention_backend(model, Policy([Rule("all", "native_math")]))
    model.set_attn_processor(AttnProcessor())
    with pytest.warns(AnyattnWarning, match="got the processor AttnProcessor, which anyattn doesn't reach"):
        output("unet", model, inputs)


def test_pipelines_that_share_models_get_the_latest_policy_and_give_it_back() -> None:
    from diffusers import StableDiffusionXLPipeline

    built = demo("sdxl")
    first, second = built.pipeline, StableDiffusionXLPipeline(**built.pipeline.components, add_watermarker=False)
    second.set_progress_bar_config(disable=True)
    anyattn.set_attention_backend(first, Policy([Rule("first", "native_math", role="self"), Rule("vae", "auto")]))
    anyattn.set_attention_backend(second, Policy([Rule("second", "native", role="self", steps="1:")]))
    assert rules_by_step(built.arguments, second)[:2] == [{"first", "vae"}, {"second", "vae"}]
    anyattn.reset_attention_backend(second)
    assert rules_by_step(built.arguments, second)[0] == {"first", "vae"}
    anyattn.reset_attention_backend(first)
    assert all(step == set() for step in rules_by_step(built.arguments, second))


def test_policy_of_a_model_beats_its_pipelines_and_a_pin_of_the_model_waits() -> None:
    built = demo("flux")
    pipe = built.pipeline
    anyattn.set_attention_backend(pipe.transformer, Policy([Rule("model", "native_math", layers="0")]))
    anyattn.set_attention_backend(pipe, Policy([Rule("pipeline", "native")]))
    steps = by_step(built.arguments, pipe)
    assert list(steps[0].values()) == ["model", "pipeline"]
    with pytest.warns(AnyattnWarning, match="waits in layers for which policy rule 'pipeline' decides"):
        anyattn.set_attention_backend(pipe.vae, "native_math")
    assert set(by_step(built.arguments, pipe)[-1].values()) == {"pipeline"}
    anyattn.reset_attention_backend(pipe)
    steps = by_step(built.arguments, pipe)
    assert list(steps[0].values()) == ["model"]
    assert set(steps[-1].values()) == {"model"}  # the pin of the VAE, whose source is "model" too


def test_stock_setter_of_diffusers_says_that_it_waits() -> None:
    built = demo("flux")
    anyattn.set_attention_backend(built.pipeline, Policy([Rule("all", "native_math", role="self", steps="1:")]))
    with pytest.warns(AnyattnWarning, match=r"waits: anyattn pinned layers of it to native_math"):
        built.pipeline.transformer.set_attention_backend("native")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pipeline: pickle.loads(pickle.dumps(pipeline))])
def test_copied_pipeline_counts_its_own_steps_and_is_reset_by_itself(way: Any) -> None:
    built = demo("flux")
    stock = vars(type(built.pipeline))["__call__"]
    anyattn.set_attention_backend(built.pipeline, MIDDLE)
    twin = way(built.pipeline)
    anyattn.reset_attention_backend(built.pipeline)
    assert rules_by_step(built.arguments, built.pipeline) == [set()] * 5
    assert rules_by_step(built.arguments, twin) == [{"rest"}, {"middle"}, {"middle"}, {"rest"}, {"vae"}]
    anyattn.reset_attention_backend(twin)
    assert rules_by_step(built.arguments, twin) == [set()] * 5
    assert vars(type(twin))["__call__"] is stock
    with pytest.raises(InvalidCallError, match="No backend was set"):
        anyattn.reset_attention_backend(twin)


def test_saved_pipeline_is_the_same_with_a_policy(tmp_path: Any) -> None:
    built = demo("flux")
    built.pipeline.save_pretrained(tmp_path / "without")
    anyattn.set_attention_backend(built.pipeline, MIDDLE)
    built.pipeline.save_pretrained(tmp_path / "with")
    MIDDLE.save(tmp_path / "with")
    files = {
        folder: {
            str(path.relative_to(tmp_path / folder)): path.read_bytes() for path in (tmp_path / folder).rglob("*.json")
        }
        for folder in ("without", "with")
    }
    assert files["with"] == files["without"]
    missing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    loaded = type(built.pipeline).from_pretrained(tmp_path / "with", **missing)
    loaded.set_progress_bar_config(disable=True)
    anyattn.set_attention_backend(loaded, Policy.load(tmp_path / "with"))
    assert rules_by_step(built.arguments, loaded) == [{"rest"}, {"middle"}, {"middle"}, {"rest"}, {"vae"}]


def test_disabled_integration_takes_policies_away() -> None:
    built = demo("flux")
    built.run()
    before = state(built.pipeline)
    anyattn.set_attention_backend(built.pipeline, MIDDLE)
    integration.disable()
    assert not [one for one in built.pipeline.transformer.modules() if covering.is_covered(one)]
    assert rules_by_step(built.arguments, built.pipeline) == [set()] * 5
    assert state(built.pipeline) == before


def test_ready_made_policies_fit_their_models() -> None:
    from diffusers import FluxTransformer2DModel, WanTransformer3DModel

    pipe, arguments = hunyuan_video()
    anyattn.set_attention_backend(pipe, Policy.named("hunyuan_video"))
    steps = by_step(arguments, pipe, height=16, width=16)
    middle, other = "middle layers and steps", "other attention of the transformer"
    names = [*(f"transformer_blocks.{i}" for i in range(6)), *(f"single_transformer_blocks.{i}" for i in range(6))]
    for number, step in enumerate(steps[:-1]):
        quantised = {f"{name}.attn" for name in names[4:-4]} if number in (1, 2, 3) else set()
        assert {layer for layer, rule in step.items() if rule == middle} == quantised
        assert {step[layer] for layer in step.keys() - quantised} == {other}
        assert any("refiner" in layer for layer in step)
    assert set(steps[-1].values()) == {"vae"}
    full = {
        "flux": (FluxTransformer2DModel, {"num_layers": 19, "num_single_layers": 38}, 49, 57),
        "wan": (WanTransformer3DModel, {"num_layers": 30}, 26, 60),
    }
    for name, (kind, config, share, total) in full.items():
        with torch.device("meta"):
            model = kind(num_attention_heads=1, **config)
        report = anyattn.set_attention_backend(model, Policy.named(name))
        assert (len(report.shares[0].layers), report.shares[0].total) == (share, total)
