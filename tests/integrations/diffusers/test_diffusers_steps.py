"""A pipeline's denoising steps are counted as it makes them, whatever its scheduler does, and only while it runs."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers_policies import by_forward, demo, named, rules_by_step
from diffusers_tiny import make, output, unet

import anyattn
from anyattn import AnyattnWarning, InvalidCallError, Policy, Rule
from anyattn.integrations import diffusers as integration
from anyattn.integrations.diffusers import schedules
from anyattn.pins import steps

STEPS = Policy(
    [
        Rule("first", "native_math", role="self", steps="0"),
        Rule("last", "native_math", role="self", steps="-1"),
        Rule("middle", "native", role="self"),
    ]
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    integration.disable()
    assert steps.current.get() is None
    assert not schedules._wrapped


def sdxl(scheduler: Any = None, policy: Policy = STEPS) -> Any:
    built = demo("sdxl", 4)
    if scheduler is not None:
        built.pipeline.scheduler = scheduler
    anyattn.set_attention_backend(built.pipeline, policy)
    return built


def forwards(built: Any, **changes: Any) -> list[set[str]]:
    arguments = {**built.arguments, "height": 64, "width": 64, "output_type": "latent", **changes}
    return by_forward(built.pipeline.unet, lambda: built.pipeline(**arguments))


SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ONE_CALL = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "LCMScheduler",
]


@pytest.mark.parametrize("name", ONE_CALL)
def test_each_call_of_the_model_is_a_step(name: str) -> None:
    built = sdxl(getattr(diffusers, name)(**SDXL))
    assert forwards(built) == [{"first"}, {"middle"}, {"middle"}, {"last"}]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_scheduler_of_order_two_calls_the_model_twice_a_step_but_for_the_last(name: str) -> None:
    built = sdxl(getattr(diffusers, name)(**SDXL))
    assert forwards(built) == [{"first"}] * 2 + [{"middle"}] * 4 + [{"last"}]


def test_scheduler_that_repeats_a_timestep_has_a_step_more() -> None:
    built = sdxl(diffusers.PNDMScheduler(**SDXL, skip_prk_steps=True))
    assert forwards(built) == [{"first"}, *[{"middle"}] * 3, {"last"}]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "HeunDiscreteScheduler"])
def test_run_that_starts_in_the_middle_counts_the_steps_that_it_makes(name: str) -> None:
    built = demo("sdxl")
    parts = {**built.pipeline.components, "scheduler": getattr(diffusers, name)(**SDXL)}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    anyattn.set_attention_backend(pipe, STEPS)
    arguments = {key: value for key, value in built.arguments.items() if key != "latents"}
    arguments |= {"image": torch.rand(1, 3, 64, 64), "strength": 0.5, "num_inference_steps": 8}
    found = by_forward(pipe.unet, lambda: pipe(**arguments, output_type="latent"))
    if name == "HeunDiscreteScheduler":
        assert found == [{"first"}] * 2 + [{"middle"}] * 4 + [{"last"}]
    else:
        assert found == [{"first"}, {"middle"}, {"middle"}, {"last"}]


def test_flux_image_to_image_starts_in_the_middle_too() -> None:
    built = demo("flux")
    pipe = diffusers.FluxImg2ImgPipeline(
        **{name: built.pipeline.components[name] for name in ("scheduler", "vae", "transformer")},
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )
    pipe.set_progress_bar_config(disable=True)
    anyattn.set_attention_backend(pipe, STEPS)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    given = {"image": torch.rand(1, 3, 64, 64), "height": 64, "width": 64, "strength": 0.4, "num_inference_steps": 10}
    given |= {name: built.arguments[name] for name in names}
    found = by_forward(pipe.transformer, lambda: pipe(**given, output_type="latent"))
    assert found == [{"first"}, {"middle"}, {"middle"}, {"last"}]


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_schedulers_with_other_arguments_and_no_count_of_their_own_are_followed(name: str) -> None:
    class Video(diffusers.StableDiffusionXLPipeline):
        def __call__(self, start: int) -> None:
            self.scheduler.set_timesteps(6)
            sample, old, back = torch.randn(1, 2, 4, 8, 8), None, None
            for timestep in self.scheduler.timesteps[start:]:
                seen.append(steps.current.get().now())
                if name == "CogVideoXDDIMScheduler":
                    sample = self.scheduler.step(sample, timestep, sample)[0]
                else:
                    out = self.scheduler.step(sample, old, timestep, back, sample, return_dict=False)
                    (sample, old), back = out, timestep
            seen.append(steps.current.get().now())

    seen: list[Any] = []
    parts = {**demo("sdxl").pipeline.components, "scheduler": getattr(diffusers, name)()}
    pipe = Video(**parts, add_watermarker=False)
    anyattn.set_attention_backend(pipe, STEPS)
    pipe(0)
    assert seen == [(step, 6) for step in range(6)] + [None]
    seen.clear()
    pipe(4)  # the first is known to be the first, and of how many only after it
    assert seen == [(0, 6), (1, 2), None]


def test_guidance_in_two_calls_of_the_model_is_one_step() -> None:
    built = demo("wan", 3)
    anyattn.set_attention_backend(built.pipeline, STEPS)
    arguments = {**built.arguments, "height": 64, "width": 64, "output_type": "latent"}
    found = by_forward(built.pipeline.transformer, lambda: built.pipeline(**arguments))
    assert found == [{"first"}] * 2 + [{"middle"}] * 2 + [{"last"}] * 2


def test_scheduler_that_was_exchanged_is_followed() -> None:
    built = sdxl()
    for name in ("DDIMScheduler", "HeunDiscreteScheduler"):
        built.pipeline.scheduler = getattr(diffusers, name).from_config(built.pipeline.scheduler.config)
        found = forwards(built)
        order = built.pipeline.scheduler.order
        assert found == [{"first"}] * order + [{"middle"}] * (2 * order) + [{"last"}]
        assert not schedules._wrapped.keys() & {(type(built.pipeline.scheduler), "step")}


def test_second_run_counts_anew_and_other_numbers_of_steps_too() -> None:
    built = sdxl()
    assert forwards(built, num_inference_steps=2) == [{"first"}, {"last"}]
    assert forwards(built, num_inference_steps=1) == [{"first"}]
    assert forwards(built, num_inference_steps=3) == [{"first"}, {"middle"}, {"last"}]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_exception_in_a_run_ends_the_count_and_the_next_run_is_right(kind: type[BaseException]) -> None:
    built = sdxl()
    stock = vars(type(built.pipeline.scheduler))["step"]

    def fail(_pipeline: Any, step: int, _timestep: Any, tensors: Any) -> Any:
        if step == 1:
            raise kind("stopped")
        return tensors

    with pytest.raises(kind, match="stopped"):
        forwards(built, callback_on_step_end=fail)
    assert vars(type(built.pipeline.scheduler))["step"] is stock
    assert steps.current.get() is None
    assert forwards(built) == [{"first"}, {"middle"}, {"middle"}, {"last"}]


def test_model_outside_of_a_run_is_warned_of_and_inside_a_block_is_not() -> None:
    built = sdxl()
    given = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": 1,
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)},
    }
    model = built.pipeline.unet

    def call() -> None:
        with torch.no_grad():
            model(**given)

    with anyattn.denoising_step(0, 3):
        assert by_forward(model, call) == [{"first"}]
    with pytest.warns(AnyattnWarning, match=r"policy rule 'first', policy rule 'last' can't apply"):
        assert by_forward(model, call) == [{"middle"}]


def test_text_encoder_and_vae_outside_of_the_steps_are_not_warned_of() -> None:
    built = demo("sdxl")
    policy = Policy([Rule("middle", "native_math", steps="1:-1"), Rule("rest", "native")])
    anyattn.set_attention_backend(built.pipeline, policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnyattnWarning)
        found = rules_by_step(built.arguments, built.pipeline)
        with torch.no_grad():
            built.pipeline.vae.decode(torch.randn(1, 4, 16, 16))
    assert found == [{"rest"}, {"middle"}, {"middle"}, {"rest"}, {"rest"}]


class Copying(diffusers.StableDiffusionXLPipeline):
    """A pipeline that steps a copy of its scheduler, and another one beside it, as LTX 2 and SkyReels do."""

    def __call__(self, count: int, beside: bool = False) -> None:
        scheduler = copy.deepcopy(self.scheduler)
        other = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(count)
        if beside:
            other.set_timesteps(count)
        sample = torch.randn(1, 4, 16, 16)
        extra = {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
        for timestep in scheduler.timesteps:
            text = torch.randn(1, 5, 32)
            noise = self.unet(scheduler.scale_model_input(sample, timestep), timestep, text, added_cond_kwargs=extra)
            sample = scheduler.step(noise.sample, timestep, sample).prev_sample
            if beside:
                other.step(noise.sample, timestep, sample)


@pytest.mark.parametrize("beside", [False, True])
def test_copies_of_the_scheduler_made_in_the_run_are_followed(beside: bool) -> None:
    pipe = Copying(**demo("sdxl").pipeline.components, add_watermarker=False)
    anyattn.set_attention_backend(pipe, STEPS)
    with torch.no_grad():
        assert by_forward(pipe.unet, lambda: pipe(3, beside)) == [{"first"}, {"middle"}, {"last"}]


def test_pipeline_that_never_steps_its_scheduler_is_warned_of() -> None:
    class Never(diffusers.StableDiffusionXLPipeline):
        def __call__(self, count: int) -> None:
            self.scheduler.set_timesteps(count)

    pipe = Never(**demo("sdxl").pipeline.components, add_watermarker=False)
    anyattn.set_attention_backend(pipe, STEPS)
    with pytest.warns(AnyattnWarning, match=r"Never set its timesteps and never called its scheduler's step"):
        pipe(3)
    pipe(1)


def test_pipeline_without_a_scheduler_is_refused() -> None:
    class Bare(diffusers.DiffusionPipeline):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet)

    pipe = Bare(unet())
    with pytest.raises(
        InvalidCallError, match=r"Bare has no scheduler whose steps could be counted\. Nothing was changed"
    ):
        anyattn.set_attention_backend(pipe, STEPS)
    assert not integration.is_enabled()
    anyattn.set_attention_backend(pipe, Policy([Rule("all", "native")]))


def test_subclass_that_calls_its_parents_pipeline_counts_once() -> None:
    class Child(diffusers.StableDiffusionXLPipeline):
        def __call__(self, **kwargs: Any) -> Any:
            return super().__call__(**kwargs)

    built = sdxl()
    child = Child(**built.pipeline.components, add_watermarker=False)
    child.set_progress_bar_config(disable=True)
    anyattn.set_attention_backend(child, STEPS)
    arguments = {**built.arguments, "height": 64, "width": 64, "output_type": "latent"}
    assert by_forward(child.unet, lambda: child(**arguments)) == [{"first"}, {"middle"}, {"middle"}, {"last"}]


def test_pipelines_in_two_threads_share_a_model_and_count_each_its_own_steps() -> None:
    built = sdxl()
    other = diffusers.StableDiffusionXLPipeline(
        **{**built.pipeline.components, "scheduler": diffusers.DDIMScheduler(**SDXL)}, add_watermarker=False
    )
    other.set_progress_bar_config(disable=True)
    anyattn.set_attention_backend(other, STEPS)
    barrier = threading.Barrier(2, timeout=60)
    found: dict[int, list[set[str]]] = {}

    def run(pipe: Any, count: int) -> None:
        ends = []

        def meet(_pipeline: Any, step: int, _timestep: Any, tensors: Any) -> Any:
            ends.append(len(calls))
            if step < 3:
                barrier.wait()
            return tensors

        arguments = {**built.arguments, "height": 64, "width": 64, "output_type": "latent"}
        with anyattn.record() as calls:
            pipe(**{**arguments, "num_inference_steps": count, "callback_on_step_end": meet})
        spans = zip([0, *ends], ends, strict=False)
        found[count] = [{named(call) for call in calls[first:last]} for first, last in spans]

    threads = [threading.Thread(target=run, args=pair) for pair in ((built.pipeline, 3), (other, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {
        3: [{"first"}, {"middle"}, {"last"}],
        5: [{"first"}, {"middle"}, {"middle"}, {"middle"}, {"last"}],
    }


def test_compiled_model_is_one_graph_for_each_rule_and_follows_the_steps() -> None:
    model, inputs = make("flux")
    want = output("flux", model, inputs)
    policy = Policy([Rule("middle", "native_math", role="self", steps="1:-1"), Rule("rest", "native")])
    anyattn.set_attention_backend(model, policy)
    counts, graphs = [], 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        for step in range(5):
            with anyattn.denoising_step(step, 5):
                torch.testing.assert_close(output("flux", compiled, inputs), want, rtol=1e-4, atol=1e-4)
            counts.append(graphs)
    assert counts == [1, 2, 2, 2, 2] + [2] * 5


def test_compiled_transformer_of_a_pipeline_gives_what_the_eager_one_does() -> None:
    built = demo("flux", 4)
    policy = Policy([Rule("middle", "native_math", role="self", steps="1:-1"), Rule("rest", "native")])
    want = built.run().latents
    graphs: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    built.pipeline.transformer.compile(backend=backend)
    anyattn.set_attention_backend(built.pipeline, policy)
    torch.testing.assert_close(built.run().latents, want, rtol=1e-4, atol=1e-4)
    first = len(graphs)
    torch.testing.assert_close(built.run().latents, want, rtol=1e-4, atol=1e-4)
    assert len(graphs) == first


def test_signatures_that_pipelines_read_stay() -> None:
    import inspect

    built = sdxl()
    scheduler, pipe = built.pipeline.scheduler, built.pipeline
    before = [inspect.signature(scheduler.step), inspect.signature(scheduler.set_timesteps)]
    during: list[Any] = []

    def look(_pipeline: Any, _step: int, _timestep: Any, tensors: Any) -> Any:
        during[:] = [inspect.signature(scheduler.step), inspect.signature(scheduler.set_timesteps), type(scheduler)]
        return tensors

    forwards(built, callback_on_step_end=look)
    assert during == [*before, diffusers.EulerDiscreteScheduler]
    assert "prompt" in inspect.signature(pipe.__call__).parameters
