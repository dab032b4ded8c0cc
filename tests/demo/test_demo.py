"""The demo: real pipelines, a truth that is float64 throughout, and a budget that wrong kernels leave."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="the demo's models come from Diffusers")

import anyattn
from anyattn.adapters.native import Native
from anyattn.backend.protocol import Backend, Lowering, Parts, Plan
from anyattn.backend.protocol import Output as BackendOutput
from anyattn.demo import (
    MODELS,
    BackendRun,
    DemoResult,
    Errors,
    MissingExtraError,
    ModelName,
    ModelResult,
    Progress,
    build_pipeline,
    run_demo,
    usable_backends,
    write_contact_sheet,
)
from anyattn.demo.models import Output
from anyattn.demo.plain import PlainArithmetic, plain_attention
from anyattn.demo.results import allow, measure
from anyattn.demo.sheet import HEADER, LABEL, PICTURE
from anyattn.environment import Environment
from anyattn.errors import InvalidCallError, UnknownBackendError
from anyattn.integrations.diffusers import is_enabled
from anyattn.reference.tolerance import BAND, SLACK
from anyattn.selection import registry
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec


class _Sabotaged(Backend):
    """`native` without its short cuts, so that a subclass can spoil it in `run`."""

    declarations = Native.declarations
    run = staticmethod(Native.run)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        return Native().lower(spec, env)


class _WrongScale(_Sabotaged):
    name = "wrong_scale"

    @staticmethod
    def run(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts) -> BackendOutput:
        return Native.run(plan, 0.99 * query, key, value, parts)


class _IgnoresPadding(_Sabotaged):
    name = "ignores_padding"

    @staticmethod
    def run(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts) -> BackendOutput:
        if parts.dense is not None:
            parts = parts._replace(dense=torch.ones_like(parts.dense))
        if parts.key is not None:
            parts = parts._replace(key=torch.ones_like(parts.key))
        return Native.run(plan, query, key, value, parts)


class _NaN(_Sabotaged):
    name = "gives_nan"

    @staticmethod
    def run(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts) -> BackendOutput:
        return torch.full_like(query, math.nan)


class _Raises(_Sabotaged):
    name = "raises"

    @staticmethod
    def run(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: Parts) -> BackendOutput:
        raise RuntimeError("out of luck")


class _RefusesMasks(_Sabotaged):
    name = "refuses_masks"

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if not spec.mask.is_empty:
            yield Reason("mask", "no mask", "a mask", "choose another backend")


@pytest.fixture
def sabotaged() -> Iterator[None]:
    backends = (_WrongScale(), _IgnoresPadding(), _NaN(), _Raises(), _RefusesMasks())
    for backend in backends:
        registry.register(backend)
    yield
    for backend in backends:
        registry.unregister(backend.name)


@pytest.mark.parametrize("model", MODELS)
def test_truth_follows_a_change_that_float32_could_not_hold(model: ModelName) -> None:
    # One rounding to float32 anywhere on the way would swallow a change of 1e-12, or blow it up to 1e-8.
    def image(factor: float) -> torch.Tensor:
        built = build_pipeline(model, widen=True, steps=2)
        built.arguments["latents"] = factor * built.arguments["latents"]
        with PlainArithmetic(keep_float64=True):
            output = built.run()
        assert output.latents.dtype == output.image.dtype == torch.float64
        return output.image

    change = (image(1 + 1e-12) - image(1.0)).abs().max()
    assert 1e-13 < change < 1e-11


@pytest.mark.parametrize("model", MODELS)
def test_plain_run_is_close_to_the_truth(model: ModelName) -> None:
    with PlainArithmetic(keep_float64=True) as exact:
        truth = build_pipeline(model, widen=True, steps=2).run()
    with PlainArithmetic(keep_float64=False) as plain:
        errors = measure(build_pipeline(model, steps=2).run(), truth)
    assert exact.calls == plain.calls > 0
    assert 0 < errors.image < 1e-5
    assert 0 < errors.latents < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_images_have_contrast_and_are_not_cut_off(model: ModelName) -> None:
    image = build_pipeline(model, steps=2).run().image
    assert image.shape[1:] == (3, 64, 64)
    assert image.isfinite().all()
    assert image.std() > 0.05
    assert ((image <= 0) | (image >= 1)).float().mean() < 0.05


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_gives_the_same_pipeline_and_another_seed_another(model: ModelName) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        built = build_pipeline(model, seed=seed)
        parts = [part for part in built.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        inputs = [value for value in built.arguments.values() if isinstance(value, torch.Tensor)]
        return [tensor for part in parts for tensor in part.parameters()] + inputs

    state = torch.random.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_widened_model_has_the_rounded_weights() -> None:
    rounded = build_pipeline("wan", dtype=torch.bfloat16).pipeline.transformer.state_dict()
    widened = build_pipeline("wan", dtype=torch.bfloat16, widen=True).pipeline.transformer.state_dict()
    assert {tensor.dtype for tensor in widened.values()} == {torch.float64}
    assert all(torch.equal(rounded[name].double(), widened[name]) for name in rounded)
    # Wan keeps its norms in float32 beside bfloat16 weights, and so does the demo.
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16, torch.float32}


def test_lumina2_has_grouped_heads_and_qwen_image_padding() -> None:
    config = build_pipeline("lumina2").pipeline.transformer.config
    assert config.num_kv_heads < config.num_attention_heads
    mask = build_pipeline("qwen_image").arguments["prompt_embeds_mask"]
    assert mask.sum(-1).unique().numel() == 2


@pytest.mark.parametrize("mask", [None, "boolean", "bias"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_attention_agrees_with_sdpa(mask: str | None, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for length in (5, 7, 7))
    attn_mask = None
    if mask is not None:
        attn_mask = torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    if mask == "boolean":
        attn_mask = attn_mask > -1
    ours = plain_attention(query, key, value, attn_mask, scale=scale)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_plain_attention_refuses_what_it_does_not_do(extra: dict[str, object]) -> None:
    query = torch.ones(1, 1, 2, 8)
    with pytest.raises(ValueError, match=next(iter(extra))):
        plain_attention(query, query, query, **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_is_twice_the_plain_error_plus_the_rounding_band(dtype: torch.dtype) -> None:
    truth = Output(latents=torch.tensor([-4.0, 1.0]).double(), image=torch.tensor([0.5]).double())
    plain = Output(latents=truth.latents + torch.tensor([0.125, -0.5]), image=truth.image - 0.25)
    allowed = allow(plain, truth, dtype)
    band = BAND * torch.finfo(dtype).eps
    assert measure(plain, truth) == Errors(latents=0.5, image=0.25)
    assert allowed == Errors(latents=SLACK * 0.5 + 4 * band, image=SLACK * 0.25 + 0.5 * band)
    assert Errors(1.0, 0.5).within(allowed)
    assert not Errors(1.1, 0.0).within(allowed)
    assert not Errors(0.0, 0.6).within(allowed)
    assert not Errors(math.nan, 0.0).within(allowed)


def test_demo_passes_with_native_and_reports_every_call() -> None:
    told: list[Progress] = []
    result = run_demo(["flux", "sdxl"], ["native", "_native_math"], steps=2, progress=told.append)
    assert result.ok
    assert not is_enabled()
    assert [model.name for model in result.models] == ["flux", "sdxl"]
    for model in result.models:
        assert [run.backend for run in model.runs] == ["native", "native_math"]
        for run in model.runs:
            assert (run.status, run.reason) == ("passed", "")
            assert run.calls == model.calls == sum(count for _, count in run.kernels)
            assert run.seconds is not None
            assert run.seconds > 0
    assert [step.done for step in told] == list(range(9))
    assert {step.total for step in told} == {8}
    assert json.loads(json.dumps(result.to_dict()))["models"][0]["runs"][0]["status"] == "passed"


def test_demo_passes_in_half_precision() -> None:
    result = run_demo(["sd3", "wan"], ["native"], dtype=torch.bfloat16, steps=1)
    assert result.ok
    assert result.dtype == "bfloat16"


def test_every_usable_backend_passes_on_padded_and_grouped_models() -> None:
    result = run_demo(["qwen_image", "lumina2"], steps=1)
    statuses = {(m.name, run.backend): (run.status, run.reason) for m in result.models for run in m.runs}
    assert {backend for _, backend in statuses} == set(usable_backends()) >= {"native", "native_math", "flex"}
    assert all(status in ("passed", "refused") for status, _ in statuses.values()), statuses
    assert result.ok


@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize("backend", ["wrong_scale", "gives_nan"])
def test_wrong_backend_leaves_the_budget(backend: str) -> None:
    result = run_demo(["sd3"], ["native", backend], steps=1)
    right, wrong = result.models[0].runs
    assert (right.status, wrong.status) == ("passed", "failed")
    assert "allowed" in wrong.reason
    assert not result.ok


@pytest.mark.usefixtures("sabotaged")
@pytest.mark.parametrize("model", ["qwen_image", "lumina2"])
def test_backend_that_ignores_padding_leaves_the_budget(model: ModelName) -> None:
    result = run_demo([model], ["ignores_padding"], steps=1)
    assert result.models[0].runs[0].status == "failed"
    assert not result.ok


@pytest.mark.usefixtures("sabotaged")
def test_refusal_is_reported_with_its_reason_and_is_no_failure() -> None:
    result = run_demo(["qwen_image"], ["native", "refuses_masks"], steps=1)
    run = result.models[0].runs[1]
    assert run.status == "refused"
    assert "mask: needs no mask, got a mask" in run.reason
    assert run.errors is run.seconds is run.image is None
    assert result.ok
    # A model that nothing ran shows nothing.
    assert not run_demo(["qwen_image"], ["refuses_masks"], steps=1).ok


@pytest.mark.usefixtures("sabotaged")
def test_kernel_that_raises_is_a_failure_and_the_others_still_run() -> None:
    result = run_demo(["flux"], ["raises", "native"], steps=1)
    broken, right = result.models[0].runs
    assert (broken.status, right.status) == ("failed", "passed")
    assert "KernelError" in broken.reason
    assert "out of luck" in broken.reason
    assert not result.ok


def test_attention_that_does_not_reach_the_backend_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    put, take = anyattn.set_attention_backend, anyattn.reset_attention_backend
    monkeypatch.setattr(anyattn, "set_attention_backend", lambda pipeline, name: put(pipeline.vae, name))
    monkeypatch.setattr(anyattn, "reset_attention_backend", lambda pipeline: take(pipeline.vae))
    run = run_demo(["flux"], ["native"], steps=1).models[0].runs[0]
    assert run.status == "failed"
    assert run.reason.startswith("1 of the model's 3 attention calls")


def test_wrong_arguments_are_refused_before_anything_runs() -> None:
    def never(step: Progress) -> None:
        raise AssertionError(step)

    with pytest.raises(InvalidCallError, match="flux, sd3"):
        run_demo(["flux", "dall-e"], progress=never)  # type: ignore[list-item]
    with pytest.raises(InvalidCallError, match="some of"):
        run_demo([], progress=never)
    with pytest.raises(InvalidCallError, match="float64"):
        run_demo(["flux"], dtype=torch.float64, progress=never)
    with pytest.raises(InvalidCallError, match="use cpu"):
        run_demo(["flux"], device="mps", progress=never)
    for backends in ([], ["auto"]):
        with pytest.raises(InvalidCallError, match="one backend or more"):
            run_demo(["flux"], backends, progress=never)
    with pytest.raises(InvalidCallError, match="steps must be at least 1"):
        run_demo(["flux"], steps=0, progress=never)
    with pytest.raises(UnknownBackendError, match="native_math"):
        run_demo(["flux"], ["native_maths"], progress=never)
    with pytest.raises(InvalidCallError, match="flux, sd3"):
        build_pipeline("dall-e")  # type: ignore[arg-type]


def _result() -> DemoResult:
    errors = Errors(1e-6, 1e-7)
    image = torch.linspace(0, 1, 5 * 3 * 64 * 64).view(5, 3, 64, 64)
    runs = (
        BackendRun("native", True, "passed", calls=7, seconds=0.1, errors=errors, image=image),
        BackendRun("flex", True, "refused", reason="mask: " + "because " * 40),
        BackendRun("flash2", True, "failed", reason="nan", seconds=1.0, errors=errors, image=image * math.nan),
    )
    model = ModelResult("wan", "Wan (video)", 7, image, 0.5, errors, errors, runs)
    return DemoResult("cpu", "float32", 3, 0, (model, model))


def test_contact_sheet_has_a_cell_per_run(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="the contact sheet is drawn with Pillow")
    path = write_contact_sheet(_result(), tmp_path / "new" / "sheet.png")
    with image_module.open(path) as sheet:
        assert sheet.format == "PNG"
        width, height = sheet.size
        first = sheet.getpixel((LABEL, HEADER))
        last = sheet.getpixel((LABEL + 2 * PICTURE + 1, HEADER + PICTURE - 1))
    truth = _result().models[0].image
    assert first == tuple((truth[0, :, 0, 0] * 255).round().int().tolist())
    assert last == tuple((truth[-1, :, -1, -1] * 255).round().int().tolist())
    single = write_contact_sheet(DemoResult("cpu", "float32", 3, 0, _result().models[:1]), tmp_path / "single.png")
    with image_module.open(single) as sheet:
        assert sheet.size[0] == width
        assert sheet.size[1] < height


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_missing_package_of_the_models_is_named_with_its_cure(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*anyattn\[demo\]"):
        run_demo(["flux"], ["native"])


def test_missing_pillow_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"'PIL'.*anyattn\[demo\]"):
        write_contact_sheet(_result(), tmp_path / "sheet.png")


def test_models_calls_are_counted_while_torchs_function_is_replaced_elsewhere() -> None:
    from anyattn.demo.plain import PlainArithmetic

    elsewhere, q = torch.nn.Linear(2, 2), torch.randn(1, 2, 4, 8)
    anyattn.set_attention_backend(elsewhere, "native_math")
    try:
        with PlainArithmetic(keep_float64=False) as mode:
            F.scaled_dot_product_attention(q, q, q)
    finally:
        anyattn.reset_attention_backend(elsewhere)
    assert mode.calls == 1
