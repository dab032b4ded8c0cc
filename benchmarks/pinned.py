"""Time a whole step of Diffusers' models: stock, and with a backend set by anyattn. What counts is the ratio.

On a GPU: SDXL, SD 1.5 and FLUX in full size, bf16, random weights. On a CPU: a tiny U-Net and a tiny FLUX, where the
host's share is largest, in one thread and in that thread's own time. One model is switched between the ways, outside
what is timed, in shuffled order in each round:

- stock: Diffusers alone, the integration disabled
- enabled: the integration enabled, nothing asked of it
- pinned: `anyattn.set_attention_backend(model, "native")`, or another of `--backends`, each a way of its own
- routed: `model.set_attention_backend("anyattn")`

    python benchmarks/pinned.py [--device cuda] [--models sdxl sd15 flux] [--backends native flash3] [--compile]
        [--rounds 40] [--json pinned.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

import anyattn
from anyattn.integrations import diffusers as integration

WAYS = ["stock", "enabled", "pinned", "routed"]
BACKENDS = {"pinned": "native"}
"""The backend of each way that pins one."""


class Case(NamedTuple):
    """A model and its inputs; `build` runs with the device and dtype in force."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


def unet(latents: int, **config: Any) -> Case:
    """Give a U-Net with the inputs that its configuration asks for, for square latents."""
    width = config.get("cross_attention_dim", 768)

    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {
            "sample": torch.randn(1 if latents < 32 else 2, 4, latents, latents),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": torch.randn(1 if latents < 32 else 2, 77, width),
        }
        if "addition_embed_type" in config:
            given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.ones(2, 6)}
        return given

    return Case(lambda: diffusers.UNet2DConditionModel(**config), inputs)


def flux(tokens: int, text: int, **config: Any) -> Case:
    """Give a FLUX transformer with inputs of that many image and text tokens."""
    joint, pooled = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 768)

    def inputs() -> dict[str, Any]:
        given = {
            "hidden_states": torch.randn(1, tokens, config.get("in_channels", 64)),
            "encoder_hidden_states": torch.randn(1, text, joint),
            "pooled_projections": torch.randn(1, pooled),
            "timestep": torch.tensor([1.0]),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(text, 3),
        }
        if config.get("guidance_embeds"):
            given["guidance"] = torch.tensor([3.5])
        return given

    return Case(lambda: diffusers.FluxTransformer2DModel(**config), inputs)


SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
TINY_FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}

CASES: dict[str, dict[str, Case]] = {
    "cpu": {"tiny_unet": unet(8, **TINY_UNET), "tiny_flux": flux(16, 7, **TINY_FLUX)},
    "cuda": {
        "sdxl": unet(128, **SDXL),
        "sdxl_512": unet(64, **SDXL),
        "sd15": unet(64, cross_attention_dim=768, attention_head_dim=8),
        "flux": flux(4096, 512, guidance_embeds=True),
    },
}


def switch(model: nn.Module, way: str) -> None:
    """Bring a model into one of the ways, from whatever it was in."""
    integration.disable()
    if way != "stock":
        integration.enable()
    if way in BACKENDS:
        anyattn.set_attention_backend(model, BACKENDS[way])
    elif way == "routed":
        model.set_attention_backend("anyattn")  # type: ignore[operator]


def measure(case: Case, device: str, rounds: int, steps: int, *, compiled: bool) -> dict[str, list[float]]:
    """Give the times of one step in milliseconds, in each way, a value a round."""
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        torch.set_default_dtype(dtype)
        model = case.build().eval()
        inputs = case.inputs()
        torch.set_default_dtype(torch.float32)
    run = torch.compile(model) if compiled else model
    # One thread does all the work on a CPU: its own time leaves out what else the machine does.
    clock = time.thread_time_ns if device == "cpu" else time.perf_counter_ns
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    order = list(WAYS)
    for number in range(rounds + 1):
        random.shuffle(order)
        for way in order:
            switch(model, way)
            for _ in range(3 if number == 0 else 1):
                run(**inputs)
            _wait(device)
            start = clock()
            for _ in range(steps):
                run(**inputs)
            _wait(device)
            if number:
                times[way].append((clock() - start) / steps / 1e6)
    switch(model, "stock")
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Give medians, their ratio to stock, and the median and quartiles of the ratios within one round."""
    rows = {}
    stock = times["stock"]
    for way, values in times.items():
        ratios = [value / ground for value, ground in zip(values, stock, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[way] = {
            "median_ms": statistics.median(values),
            "ratio": statistics.median(values) / statistics.median(stock),
            "round_ratio": middle,
            "round_ratio_q1": low,
            "round_ratio_q3": high,
        }
    return rows


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=sorted(CASES))
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--backends", nargs="*", default=[])
    options = parser.parse_args()
    for backend in options.backends:
        BACKENDS[f"pinned, {backend}"] = backend
        WAYS.append(f"pinned, {backend}")
    if options.device == "cpu":
        torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    cases = CASES[options.device]
    found: dict[str, Any] = {}
    print(f"{'model':12}{'way':22}{'median ms':>11}{'ratio':>8}{'in one round (quartiles)':>28}")
    for name in options.models or cases:
        with torch.no_grad():
            times = measure(cases[name], options.device, options.rounds, options.steps, compiled=options.compile)
        found[name] = summary(times)
        for way, row in found[name].items():
            spread = f"{row['round_ratio']:.3f} ({row['round_ratio_q1']:.3f} to {row['round_ratio_q3']:.3f})"
            print(f"{name:12}{way:22}{row['median_ms']:11.3f}{row['ratio']:8.3f}{spread:>28}", flush=True)
    if options.json:
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
        about |= {"cores": os.cpu_count(), "device": options.device, "compiled": options.compile}
        if options.device == "cuda":
            about["name"] = torch.cuda.get_device_name()
        written = {"about": about, "rounds": options.rounds, "steps": options.steps, "models": found}
        Path(options.json).write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
