"""torch.compile makes as many graphs of a pinned or routed model as of one that isn't, and follows a change."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers_tiny import flux_inputs, make

import anyattn
from anyattn.demo.models import build_pipeline
from anyattn.integrations import diffusers as integration


@pytest.fixture(autouse=True)
def _as_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    integration.disable()


class Graphs:
    """A compiler that runs the graph as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.math = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        self.math += any("attention_math" in str(node.target) for node in graph.graph.nodes)
        return graph


def long_flux(single_layers=10):
    """Ten layers of a kind: more than dynamo traces one piece of code for before it gives up."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def unpinned(model):
    pass


def pinned(model):
    anyattn.set_attention_backend(model, "native")


def routed(model):
    integration.enable()
    model.set_attention_backend("anyattn")


@pytest.mark.parametrize("way", [unpinned, pinned, routed])
def test_repeated_blocks_make_as_many_graphs_as_without_a_pin(way):
    model, graphs = long_flux(), Graphs()
    way(model)
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    with torch.no_grad():
        expected = model(**flux_inputs(), return_dict=False)[0]
        model(**flux_inputs(), return_dict=False)
        # One of the double blocks, one of the single blocks, one more for a number that changes between the two.
        assert (graphs.count, graphs.math) == (3, 0)
        anyattn.set_attention_backend(model, "native_math")
        model(**flux_inputs(), return_dict=False)
        assert (graphs.count, graphs.math) == (5, 2)
        anyattn.reset_attention_backend(model)
        model(**flux_inputs(), return_dict=False)
    # Without a pin for the first time, or as it was.
    assert graphs.count == (7 if way is pinned else 5)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("way", [unpinned, pinned, routed])
def test_whole_model_is_one_graph(way):
    # The layers are inlined into one graph: what holds for three holds for ten, which take three times as long.
    model, graphs = long_flux(single_layers=3), Graphs()
    way(model)
    run = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        run(**flux_inputs())
        assert graphs.count == 1
        anyattn.set_attention_backend(model, "native_math")
        run(**flux_inputs())
    assert (graphs.count, graphs.math) == (2, 1)


def test_pin_holds_below_a_graph_break():
    model, inputs = make("flux")
    block = model.single_transformer_blocks[0]

    class Broken(type(block.attn.processor)):
        __call__ = torch._dynamo.disable(type(block.attn.processor).__call__)

    block.attn.processor = Broken()
    anyattn.set_attention_backend(model, "native_math")
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    with torch.no_grad(), anyattn.record() as calls:
        compiled(**inputs)
    assert [call.chosen for call in calls][-1] == "native_math"


def test_processor_that_is_not_reached_is_warned_of_while_tracing():
    model, inputs = make("unet")
    anyattn.set_attention_backend(model, "native")
    model.set_attention_slice("auto")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), pytest.warns(anyattn.AnyattnWarning, match="SlicedAttnProcessor"):
        compiled(**inputs)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_pinned_pipeline_whose_model_is_one_graph_stays_one_graph(name):
    latents = []
    for pin in (False, True):
        torch._dynamo.reset()
        made, graphs = build_pipeline(name, steps=2), Graphs()
        model = made.pipeline.unet if name == "sdxl" else made.pipeline.transformer
        model.compile(fullgraph=True, backend=graphs)
        if pin:
            anyattn.set_attention_backend(made.pipeline, "native")
        with torch.no_grad():
            latents.append(made.run().latents)
        assert graphs.count == 1
        integration.disable()
    torch.testing.assert_close(*latents)
