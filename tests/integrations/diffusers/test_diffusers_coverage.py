"""Every place in the installed Diffusers that computes attention is found by reading its source, and accounted for."""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import anyattn
from anyattn.integrations import diffusers as integration
from anyattn.integrations.diffusers.calls import doors
from anyattn.integrations.diffusers.install.sites import OWN_KERNELS, OWN_LAYERS, SDPA_CALLERS

diffusers = pytest.importorskip("diffusers")
ROOT = Path(diffusers.__file__).parent

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"
KERNELS = {
    "flex_attention", "flash_attn_func", "flash_attn_varlen_func", "memory_efficient_attention", "npu_fusion_attention",
    "flash_attention", "sageattn", "na3d", "_na3d", "baddbmm", "softmax", "get_attention_scores", "MultiheadAttention",
}  # fmt: skip

DISPATCHER_ITSELF = "models.attention_dispatch"

SDPA_LEFT_ALONE = {"pipelines.kolors.text_encoder:CoreAttention.forward": "a text encoder, listed in OWN_LAYERS"}
"""Calls of torch's function that no door covers."""

NOT_ATTENTION = {
    "models.attention:AttentionModuleMixin.set_use_memory_efficient_attention_xformers": "tries xformers on noise",
    "models.attention_processor:Attention.set_use_memory_efficient_attention_xformers": "tries xformers on noise",
    "models.attention:AttentionModuleMixin.get_attention_scores": "a helper; its callers are listed by its name",
    "models.attention_processor:Attention.get_attention_scores": "a helper; its callers are listed by its name",
    "models.condition_embedders.condition_embedder_minimax_music3:MiniMaxMusic3ConditionEncoder.forward": "layer mix",
    "models.transformers.transformer_hidream_image:MoEGate.forward": "expert gate",
    "models.transformers.transformer_nucleusmoe_image:NucleusMoELayer.forward": "expert gate",
    "models.transformers.transformer_kandinsky:nablaT_v2": "chooses blocks; the attention itself is dispatched",
    "models.transformers.transformer_kandinsky6_sr:nabla_block_mask": "chooses blocks; the attention is dispatched",
    "pipelines.deprecated.stable_diffusion_attend_and_excite.pipeline_stable_diffusion_attend_and_excite:"
    "StableDiffusionAttendAndExcitePipeline._compute_max_attention_per_index": "reads stored weights",
    "pipelines.deprecated.unidiffuser.modeling_text_decoder:UniDiffuserTextDecoder.generate_beam": "samples tokens",
    "modular_pipelines.minimax_music3.encoders:_sample_top_k": "samples tokens",
    "training_utils:compute_confidence_aware_loss": "a loss",
}
"""Uses of softmax and kernels that compute no attention of a model."""


@dataclass(frozen=True)
class Call:
    module: str
    function: str
    base: str
    name: str

    @property
    def place(self) -> str:
        return f"{self.module}:{self.function}"


def calls_in(path: Path) -> list[Call]:
    """Every call in a file of a name that has to do with attention, with the function that makes it."""
    source = path.read_text(encoding="utf-8")
    if not any(name in source for name in (*KERNELS, DISPATCH, SDPA)):
        return []
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found: list[Call] = []

    def visit(node: ast.AST, inside: tuple[str, ...]) -> None:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            inside = (*inside, node.name)
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                found.append(Call(module, ".".join(inside), ast.unparse(function.value), function.attr))
            elif isinstance(function, ast.Name):
                found.append(Call(module, ".".join(inside), "", function.id))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), ())
    return [call for call in found if call.name in KERNELS | {DISPATCH, SDPA}]


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return [call for path in sorted(ROOT.rglob("*.py")) for call in calls_in(path)]


@pytest.fixture
def _enabled():
    integration.enable()
    yield
    integration.disable()


def import_all(names):
    return [importlib.import_module(f"diffusers.{name}") for name in sorted(names)]


def test_the_search_finds_what_is_known_to_be_there(calls):
    places = {(call.place, call.name) for call in calls}
    assert ("models.transformers.transformer_flux:FluxAttnProcessor.__call__", DISPATCH) in places
    assert ("models.attention_processor:AttnProcessor2_0.__call__", SDPA) in places
    assert ("models.attention_processor:AttnProcessor.__call__", "get_attention_scores") in places
    assert len([call for call in calls if call.name == DISPATCH]) > 80


@pytest.mark.usefixtures("_enabled")
def test_every_caller_of_the_dispatcher_gets_the_door(calls):
    callers = {call.module for call in calls if call.name == DISPATCH} - {DISPATCHER_ITSELF}
    assert all(call.base == "" for call in calls if call.name == DISPATCH), "called by its own name alone"
    missed = [m.__name__ for m in import_all(callers) if vars(m).get(DISPATCH) is not doors.dispatch_attention_fn]
    assert len(callers) > 50
    assert missed == []
    integration.disable()
    kept = [m.__name__ for m in import_all(callers) if vars(m).get(DISPATCH) is doors.dispatch_attention_fn]
    assert kept == []


@pytest.mark.usefixtures("_enabled")
def test_every_caller_of_sdpa_gets_the_door_or_is_listed(calls):
    callers = [call for call in calls if call.name == SDPA and call.module != DISPATCHER_ITSELF]
    covered = {call for call in callers if SDPA_CALLERS.get(call.module) == call.base.partition(".")[0]}
    assert {call.place for call in set(callers) - covered} == set(SDPA_LEFT_ALONE)
    assert {call.module for call in covered} == set(SDPA_CALLERS), "the table lists no module without a call"
    for call in covered:
        module = importlib.import_module(f"diffusers.{call.module}")
        reached = vars(module)[call.base.partition(".")[0]]
        for part in call.base.split(".")[1:]:
            reached = getattr(reached, part)
        assert reached.scaled_dot_product_attention is doors.scaled_dot_product_attention, call


def test_every_other_kernel_is_known_with_a_reason(calls):
    others = [
        call
        for call in calls
        if call.name in KERNELS and call.module != DISPATCHER_ITSELF and not call.module.startswith("schedulers.")
    ]
    unknown = []
    for call in others:
        layer = f"diffusers.{call.module}:{call.function.rpartition('.')[0]}"
        torch_layer = f"torch.nn.modules.activation:{call.name}"
        known = call.place in NOT_ATTENTION or layer in OWN_LAYERS or torch_layer in OWN_LAYERS
        if not known and call.name not in OWN_KERNELS:
            unknown.append(f"{call.place} calls {call.name}")
    assert unknown == []
    assert set(NOT_ATTENTION) == {call.place for call in others} & set(NOT_ATTENTION), "no entry is stale"
    layers = {f"diffusers.{call.module}:{call.function.rpartition('.')[0]}" for call in others}
    assert {layer for layer in OWN_LAYERS if layer.startswith("diffusers.")} <= layers, "no entry is stale"
    assert set(OWN_KERNELS) <= {call.name for call in others}, "no entry is stale"


def processors():
    """Every attention processor class of Diffusers' model files, with its source's own opinion of it."""
    import diffusers.models.attention_processor as module

    for kind in vars(module).values():
        if isinstance(kind, type) and "AttnProcessor" in kind.__name__ and "__call__" in vars(kind):
            yield kind


@pytest.mark.usefixtures("_enabled")
def test_each_processor_is_classed_as_its_source_says(calls):
    import inspect

    for kind in processors():
        source = inspect.getsource(kind.__call__)
        layer = nn.Module()
        layer.processor = object.__new__(kind) if not issubclass(kind, nn.Module) else None
        if layer.processor is None:
            continue
        found = integration.attention_layers(layer)
        own = any(f"{name}(" in source for name in OWN_KERNELS)
        opens = f"F.{SDPA}(" in source or f"{DISPATCH}(" in source
        if own:
            assert [bool(entry.reason) for entry in found] == [True], kind
        elif opens:
            assert [entry.reason for entry in found] == [""], kind
        else:
            assert found == [], kind


def test_module_imported_while_enabled_gets_the_door_and_gives_it_back():
    name = "diffusers.models.autoencoders.autoencoder_vidtok"
    package = importlib.import_module("diffusers.models.autoencoders")
    before = importlib.import_module(name)
    integration.enable()
    try:
        del sys.modules[name]
        module = importlib.import_module(name)
        assert module is not before
        assert module.F is doors.FUNCTIONAL
        assert module.F.silu is torch.nn.functional.silu
    finally:
        integration.disable()
        assert module.F is torch.nn.functional
        sys.modules[name] = before
        package.autoencoder_vidtok = before
    assert before.F is torch.nn.functional


@pytest.mark.usefixtures("_enabled")
def test_custom_processor_reaches_anyattn_by_the_dispatcher_alone():
    from diffusers.models import attention_dispatch

    class ByDispatcher:
        def __call__(self, attn, query):
            return attention_dispatch.dispatch_attention_fn(query, query, query)

    class ByTorch:
        def __call__(self, attn, query):
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    layer = nn.Module()
    layer.processor = ByTorch()
    (found,) = integration.attention_layers(layer)
    assert "isn't one of Diffusers'" in found.reason
    layer.processor = ByDispatcher()
    (found,) = integration.attention_layers(layer)
    assert found.reached


@pytest.mark.usefixtures("_enabled")
@pytest.mark.parametrize("dimensions", [3, 4])
def test_vae_layers_without_a_head_dimension_work(dimensions):
    """Some autoencoders call torch's function with (batch, sequence, channels)."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, *(2, 4)[: dimensions - 2], 6, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    mask = torch.rand(2, *(1,)[: dimensions - 3], 6, 6) > 0.3
    masked = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    with anyattn.attention_backend("native_math"), anyattn.record() as made:
        found = doors.FUNCTIONAL.scaled_dot_product_attention(query, key, value)
        assert torch.allclose(found, expected, atol=1e-5)
        found = doors.FUNCTIONAL.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert torch.allclose(found, masked, atol=1e-5)
    assert [call.chosen for call in made] == ["native_math"] * 2


@pytest.mark.usefixtures("_enabled")
def test_keys_of_one_head_or_batch_entry_mean_what_they_mean_in_torch():
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8)
    for shape in ((1, 4, 6, 8), (2, 1, 6, 8), (1, 1, 6, 8)):
        key, value = torch.randn(2, *shape)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        with anyattn.attention_backend("native_math"):
            found = doors.FUNCTIONAL.scaled_dot_product_attention(query, key, value)
        assert torch.allclose(found, expected, atol=1e-5)
