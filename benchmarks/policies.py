"""Time a model's denoising step under its ready-made policy, beside stock Diffusers, and say what it changes.

A run denoises random latents in a number of steps with random weights and no guidance; the policies' rules by step take
turns in it. The ways run in shuffled order in each round. A way's step time is the mean over the run's steps, each the
median over rounds. Its error is the difference of its last latents to those of a run in a wider type (float32 on a GPU,
float64 on a CPU) with stock attention, as a part of their norm; the error of `stock` says what the type alone costs.

- stock: Diffusers alone
- auto: `anyattn.set_attention_backend(model, "auto")`
- policy: `anyattn.set_attention_backend(model, Policy.named(...))`
- one for each of `--backends`, set for all layers and steps, with `--precision`

    python benchmarks/policies.py [--small] [--models flux wan hunyuan_video] [--steps 10] [--rounds 5]
        [--backends sage] [--precision fp8] [--json policies.json]

`--small` builds small models and runs them on a CPU: it shows that this file works, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

import anyattn
from anyattn.integrations import diffusers as integration

SEED = 7


class Case(NamedTuple):
    """A model and its inputs; `inputs` are called with the device and dtype in force."""

    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]


def flux(side: int, text: int, **config: Any) -> Case:
    """Give FLUX with a square image of `side * side` tokens."""
    joint, pooled = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 768)

    def inputs() -> dict[str, Tensor]:
        rows, columns = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
        places = torch.stack((torch.zeros(side, side), rows, columns), -1).flatten(0, 1)
        return {
            "hidden_states": torch.randn(1, side * side, config.get("in_channels", 64)),
            "encoder_hidden_states": torch.randn(1, text, joint),
            "pooled_projections": torch.randn(1, pooled),
            "img_ids": places,
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.tensor([3.5]),
        }

    what = f"{side * side} image and {text} text tokens"
    return Case(what, lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True, **config), inputs)


def video(kind: str, latents: tuple[int, int, int], text: int, **config: Any) -> Case:
    """Give Wan or HunyuanVideo with latents of so many frames, rows and columns."""

    def inputs() -> dict[str, Tensor]:
        width = config.get("text_dim", config.get("text_embed_dim", 4096))
        given = {
            "hidden_states": torch.randn(1, config.get("in_channels", 16), *latents),
            "encoder_hidden_states": torch.randn(1, text, width),
        }
        if kind.startswith("Hunyuan"):
            given["encoder_attention_mask"] = torch.ones(1, text)
            given["pooled_projections"] = torch.randn(1, config.get("pooled_projection_dim", 768))
            given["guidance"] = torch.tensor([6000.0])
        return given

    what = f"latents of {' x '.join(map(str, latents))} and {text} text tokens"
    return Case(what, lambda: getattr(diffusers, kind)(**config), inputs)


HUNYUAN, WAN = "HunyuanVideoTransformer3DModel", "WanTransformer3DModel"
FULL = {
    "flux": flux(64, 512),
    # Wan 2.1 of 1.3B parameters: 480 x 832 pixels, 81 frames
    "wan": video(WAN, (21, 60, 104), 512, num_attention_heads=12, ffn_dim=8960, num_layers=30),
    # 544 x 960 pixels, 61 frames
    "hunyuan_video": video(HUNYUAN, (16, 68, 120), 256),
}
SMALL = {
    "flux": flux(
        8,
        7,
        in_channels=16,
        num_layers=4,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    ),
    "wan": video(
        WAN,
        (3, 8, 8),
        7,
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=128,
        num_layers=6,
        rope_max_seq_len=32,
    ),
    "hunyuan_video": video(
        HUNYUAN,
        (3, 8, 8),
        7,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=4,
        num_single_layers=6,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(16, 24, 24),
    ),
}


def built(case: Case, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model with weights from N(0, 1/fan_in), so that attention counts, and its inputs; both rounded once."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        torch.manual_seed(SEED)
        model = case.build().eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and name.endswith("weight"):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        torch.set_default_dtype(torch.float32)
        inputs = case.inputs()
    return model.to(dtype), {name: value.to(dtype) for name, value in inputs.items()}


def denoise(model: nn.Module, inputs: dict[str, Tensor], steps: int, tick: Callable[[], float]) -> tuple[Tensor, list]:
    """Follow the model from noise to an image in equal steps; return the last latents and each step's time in ms."""
    given, times = dict(inputs), []
    latents = given.pop("hidden_states")
    scale = 1.0 if isinstance(model, diffusers.FluxTransformer2DModel) else 1000.0
    for step in range(steps):
        timestep = torch.full((1,), scale * (1 - step / steps), device=latents.device, dtype=latents.dtype)
        with anyattn.denoising_step(step, steps):
            start = tick()
            velocity = model(hidden_states=latents, timestep=timestep, **given, return_dict=False)[0]
            times.append(tick() - start)
        latents = latents - velocity / steps
    return latents, times


def ticker(device: str) -> Callable[[], float]:
    """Return a clock in ms: on a GPU after all its work, on a CPU this thread's own time."""

    def tick() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter_ns() / 1e6
        return time.thread_time_ns() / 1e6

    return tick


def switch(model: nn.Module, way: str, policy: str, precision: Any) -> None:
    """Bring a model into one of the ways, from whatever it was in."""
    integration.disable()
    if way == "policy":
        anyattn.set_attention_backend(model, anyattn.Policy.named(policy))
    elif way != "stock":
        anyattn.set_attention_backend(model, way, precision="exact" if way == "auto" else precision)


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, as a part of the exact result's."""
    return float((found.to(exact.dtype) - exact).norm() / exact.norm())


def measure(name: str, case: Case, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """Give each way's step times, error, and which kernels ran by which rule."""
    dtype, wider = (torch.float32, torch.float64) if device == "cpu" else (torch.bfloat16, torch.float32)
    model, inputs = built(case, device, dtype)
    tick = ticker(device)
    ways = ["stock", "auto", "policy", *options.backends]
    times: dict[str, list[list[float]]] = {way: [] for way in ways}
    last, kernels = {}, {}
    for way in ways:  # the first run of each compiles kernels and isn't timed
        switch(model, way, name, options.precision)
        with anyattn.record() as calls:
            last[way], _ = denoise(model, inputs, options.steps, tick)
        kernels[way] = {
            f"{backend} ({source})": count
            for (backend, source), count in Counter((one.chosen, one.preference.source) for one in calls).items()
        }
    for _ in range(options.rounds):
        for way in random.sample(ways, len(ways)):
            switch(model, way, name, options.precision)
            times[way].append(denoise(model, inputs, options.steps, tick)[1])
    switch(model, "stock", name, options.precision)
    model.to(wider)
    exact, _ = denoise(model, {key: value.to(wider) for key, value in inputs.items()}, options.steps, tick)
    found = {}
    for way in ways:
        steps = [statistics.median(values) for values in zip(*times[way], strict=True)]
        found[way] = {"step_ms": statistics.fmean(steps), "steps_ms": steps, "error": relative(last[way], exact)}
        found[way] |= {"kernels": kernels[way], "runs_ms": [sum(run) for run in times[way]]}
    return {"what": case.what, "ways": found}


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--models", nargs="*", choices=sorted(FULL))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backends", nargs="*", default=[])
    parser.add_argument("--precision", default="fp8", choices=["exact", "int8", "fp8", "fp4"])
    parser.add_argument("--json")
    options = parser.parse_args()
    device, cases = ("cpu", SMALL) if options.small else ("cuda", FULL)
    if options.small:
        torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    models = {}
    print(f"{'model':15}{'way':20}{'ms a step':>11}{'of stock':>10}{'error':>11}")
    for name in options.models or cases:
        with torch.no_grad():
            models[name] = measure(name, cases[name], device, options)
        ways = models[name]["ways"]
        for way, row in ways.items():
            ratio = row["step_ms"] / ways["stock"]["step_ms"]
            print(f"{name:15}{way:20}{row['step_ms']:11.3f}{ratio:10.3f}{row['error']:11.2e}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
        about |= {"anyattn": anyattn.__version__, "device": device, "small": options.small}
        if device == "cuda":
            about["name"] = torch.cuda.get_device_name()
        written = {"about": about, "rounds": options.rounds, "steps": options.steps, "models": models}
        Path(options.json).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
