"""Padded calls of published models: anyattn told of a key mask, against the kernels told the lengths directly and SDPA.

    python benchmarks/masks.py [--json FILE] [--rounds N] [--backends flash4,flash3]

Needs a CUDA device and at least one flash kernel. One round of a variant is the mask written to in place (so that its
preparation is done again) and 24 calls, as 24 layers make; times are CUDA events, medians over rounds, the variants
interleaved in an order drawn anew each round. It also shows that the path doesn't synchronise, is captured in a CUDA
graph whose replay follows the mask, and makes no tensor of S_q x S_kv.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import anyattn
from anyattn import masks, reference

LAYERS = 24

CALLS: dict[str, tuple[int, int, int, int, int, int]] = {
    "hunyuan-480p-pad": (1, 20992, 20992, 24, 24, 128),
    "qwen-image-pad": (2, 4608, 4608, 24, 24, 128),
    "lumina2-pad": (2, 4352, 4352, 24, 8, 96),
    "ltx-cross-pad": (1, 4992, 128, 32, 32, 64),
}
"""batch, seqlen_q, seqlen_kv, heads, key/value heads, head_dim; bf16."""


def tensors(call: tuple[int, ...], grad: bool = False) -> list[Tensor]:
    batch, seqlen_q, seqlen_kv, heads, kv_heads, dim = call
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_kv, kv_heads, dim), (batch, seqlen_kv, kv_heads, dim))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for shape in shapes]


def keep_of(call: tuple[int, ...], kind: str) -> Tensor:
    """Make a padding mask: lengths uniform in [S/2, S], to the right or anywhere."""
    batch, seqlen_kv = call[0], call[2]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(seqlen_kv // 2, seqlen_kv + 1, (batch, 1), generator=generator)
    keep = torch.arange(seqlen_kv) < lengths
    if kind == "scattered":
        keep = torch.stack([row[torch.randperm(seqlen_kv, generator=generator)] for row in keep])
    return keep.cuda()


def direct(backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Callable[[], Any]:
    """Call a flash kernel as a person would who knows the lengths."""
    if backend == "flash4":
        from flash_attn.cute import flash_attn_varlen_func as flash4

        return lambda: flash4(q, k, v, seqused_k=lengths)[0]
    if backend == "flash3":
        from fa3_fwd_interface import flash_attn_varlen_func as flash3

        return lambda: flash3(q, k, v, None, None, q.shape[1], k.shape[1], seqused_k=lengths)
    from flash_attn import flash_attn_varlen_func as flash2

    batch, seqlen_q, seqlen_kv = q.shape[0], q.shape[1], k.shape[1]
    starts_q = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seqlen_q
    starts_k = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    within = torch.arange(seqlen_kv, device="cuda") < lengths[:, None]
    packed_k, packed_v = k[within], v[within]
    return lambda: flash2(q.flatten(0, 1), packed_k, packed_v, starts_q, starts_k, seqlen_q, seqlen_kv).unflatten(
        0, (batch, seqlen_q)
    )


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Callable[[], Any]:
    mask, gqa = keep[:, None, None, :], q.shape[2] != k.shape[2]
    return lambda: F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, enable_gqa=gqa
    ).transpose(1, 2)


def timed(variants: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Time one round of each variant in turn; a variant is (what precedes the layers, one layer)."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for first, layer in variants.values():
        for _ in range(2):
            first()
            layer()
    order = list(variants.items())
    shuffled = random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name, (first, layer) in order:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            first()
            for _ in range(LAYERS):
                layer()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / LAYERS)
    return {
        name: {"ms": statistics.median(found), "low": min(found), "high": max(found)} for name, found in times.items()
    }


def forward(name: str, backends: list[str], rounds: int) -> dict[str, Any]:
    """Time the forward of one call in every variant."""
    call = CALLS[name]
    q, k, v = tensors(call)
    gqa = call[3] != call[4]
    right, scattered = keep_of(call, "right"), keep_of(call, "scattered")
    lengths = right.sum(-1, dtype=torch.int32)
    nothing = lambda: None  # noqa: E731
    variants: dict[str, Any] = {"sdpa, boolean mask": (nothing, by_sdpa(q, k, v, right))}
    for backend in [*backends, "auto"]:
        if backend != "auto":
            variants[f"{backend} directly"] = (nothing, direct(backend, q, k, v, lengths))
        given = {
            "lengths": masks.KeyLengths(lengths),
            "prepared padding": anyattn.prepare_mask(masks.KeyPadding(right.clone())),
            "padding": masks.KeyPadding(right.clone()),
            "scattered": masks.KeyPadding(scattered.clone()),
            "tensor": right.clone()[:, None, None, :],
        }
        for kind, mask in given.items():

            def layer(mask: Any = mask, backend: str = backend) -> Any:
                return anyattn.attention(q, k, v, mask, enable_gqa=gqa, backend=backend)

            written = mask if isinstance(mask, Tensor) else mask.key
            # A prepared mask that is written to is no longer known; its preparation is the person's own.
            before = nothing if kind == "prepared padding" else (lambda w=written: w.copy_(w.clone()))
            variants[f"anyattn {backend}, {kind}"] = (before, layer)
    found: dict[str, Any] = {"shape": call, "ms": timed(variants, rounds)}
    ms = {key: value["ms"] for key, value in found["ms"].items()}
    best = min(ms[f"{backend} directly"] for backend in backends)
    found["over the best kernel told the lengths"] = {
        key: round(value / best, 3) for key, value in ms.items() if key.startswith("anyattn")
    }
    found["sdpa over anyattn"] = {
        key: round(ms["sdpa, boolean mask"] / value, 3) for key, value in ms.items() if key.startswith("anyattn")
    }
    chosen = anyattn.explain(q, k, v, masks.KeyPadding(right), enable_gqa=gqa, backend="auto")
    found["auto chose"] = chosen.chosen
    found["chosen by mask"] = {"scattered and lengths": chosen.kernel}
    return found


def training(name: str, backend: str, rounds: int) -> dict[str, Any]:
    """Time forward and backward against SDPA with the boolean mask."""
    call = CALLS[name]
    q, k, v = tensors(call, grad=True)
    gqa = call[3] != call[4]
    right, scattered = keep_of(call, "right"), keep_of(call, "scattered")
    flow = torch.randn(call[0], call[1], call[3], call[5], device="cuda", dtype=torch.bfloat16)

    def step(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), (q, k, v), flow)

    nothing = lambda: None  # noqa: E731
    variants: dict[str, Any] = {"sdpa, boolean mask": (nothing, step(by_sdpa(q, k, v, right)))}
    for kind, mask in (
        ("lengths", masks.KeyLengths(right.sum(-1, dtype=torch.int32))),
        ("padding", masks.KeyPadding(right)),
        ("scattered", masks.KeyPadding(scattered)),
    ):
        run = lambda mask=mask: anyattn.attention(q, k, v, mask, enable_gqa=gqa, backend=backend)  # noqa: E731
        variants[f"anyattn {backend}, {kind}"] = (lambda mask=mask: mask.key.copy_(mask.key.clone()), step(run))
    found = timed(variants, rounds)
    sdpa = found["sdpa, boolean mask"]["ms"]
    return {"ms": found, "sdpa over anyattn": {key: round(sdpa / value["ms"], 3) for key, value in found.items()}}


def conduct(backend: str) -> dict[str, Any]:
    """Show that the path doesn't synchronise, is captured and follows its mask, and makes nothing of S_q x S_kv."""
    call = CALLS["qwen-image-pad"]
    q, k, v = tensors(call)
    keep = keep_of(call, "scattered")
    mask = masks.KeyPadding(keep)

    def run() -> Tensor:
        return anyattn.attention(q, k, v, mask, backend=backend)

    run()
    found: dict[str, Any] = {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep.copy_(keep.clone())
        run()
        found["synchronises"] = False
    except RuntimeError as error:
        found["synchronises"] = str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    keep.copy_(keep.clone())
    run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in (q, k, v))
    found["peak over inputs"] = round(extra / inputs, 2)
    found["bytes of a boolean mask of every position"] = call[0] * call[1] * call[2]
    found["peak bytes"] = extra
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    keep.copy_(keep.roll(1000, -1))
    graph.replay()
    torch.cuda.synchronize()
    rows = slice(0, 64)
    truth = reference.attention(q[:, rows], k, v, masks.KeyPadding(keep))[0]
    error = float((out[:, rows].double() - truth).norm() / truth.norm())
    found["graph replay after the mask changed"] = {"right": error < 1e-2, "relative error": error}
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Give the figures that are promised."""
    long = [name for name, call in CALLS.items() if call[2] >= 4096]
    gains = [
        max(found["forward"][name]["sdpa over anyattn"][f"anyattn auto, {kind}"] for kind in ("lengths",))
        for name in long
    ]
    worst: dict[str, float] = {}
    for kind in ("lengths", "prepared padding", "padding", "scattered"):
        over = [
            found["forward"][name]["over the best kernel told the lengths"][f"anyattn auto, {kind}"] for name in CALLS
        ]
        worst[kind] = max(over)
    mean = math.exp(statistics.fmean(math.log(gain) for gain in gains))
    return {"sdpa over anyattn, geometric mean, S >= 4096": round(mean, 3), "worst over the best kernel": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="-")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backends", default="")
    options = parser.parse_args()
    usable = {row.name for row in anyattn.backends() if row.usable}
    backends = [name for name in options.backends.split(",") if name] or [
        name for name in ("flash4", "flash3", "flash2") if name in usable
    ]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "backends": backends}
    with torch.no_grad():
        found["forward"] = {}
        for name in CALLS:
            found["forward"][name] = forward(name, backends, options.rounds)
            _write(found, options.json)  # a run that is cut off keeps what it has
        found["conduct"] = {backend: conduct(backend) for backend in backends}
    found["summary"] = summary(found)
    _write(found, options.json)
    found["training"] = {
        name: {backend: training(name, backend, options.rounds) for backend in backends if backend != "flash3"}
        for name in ("qwen-image-pad", "lumina2-pad")
    }
    _write(found, options.json)
    if options.json == "-":
        print(json.dumps(found, indent=1))


def _write(found: dict[str, Any], path: str) -> None:
    if path != "-":
        Path(path).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
