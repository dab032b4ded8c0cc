"""Padded calls of published models: anyattn told of a key mask, against the kernels told the lengths directly and SDPA.

    python benchmarks/masks.py [--json FILE] [--rounds N] [--backends flash4,flash3]

Needs a CUDA device and at least one flash kernel. One round of a variant is its mask prepared anew (written to in place
first, or given to `prepare_mask`) and 24 calls, as 24 layers make; times are CUDA events. Each round runs every variant
once, in an order drawn anew, and compares it with the kernels told the lengths directly in that same round, so that a
clock that moves moves both; what is reported is the median of those ratios. Two ways:

- `queued`: the device is kept busy while the calls are queued, as it is inside a model; it shows what the device does.
- `alone`: the device is idle when the first call comes, so that what the host does first is waited for too.

It also shows that the path doesn't synchronise, is captured in a CUDA graph whose replay follows the mask, and makes no
tensor of S_q x S_kv.
"""

from __future__ import annotations

import argparse
import json
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


Variant = tuple[Callable[[], Any], Callable[[Any], Any]]
"""What precedes the layers, and one layer, which is given what that returned."""

BUSY_CYCLES = 20_000_000
"""How long the device is kept busy while 24 calls are queued: some 10 ms."""


def one_round(variant: Variant, queued: bool) -> float:
    """Give the milliseconds of one round per layer."""
    first, layer = variant
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    mask = first()
    for _ in range(LAYERS):
        layer(mask)
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / LAYERS


def timed(variants: dict[str, Variant], rounds: int, *, queued: bool) -> list[dict[str, float]]:
    """Time every variant once a round, in an order drawn anew."""
    for variant in variants.values():
        one_round(variant, queued)
    order = list(variants.items())
    shuffled = random.Random(0)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        shuffled.shuffle(order)
        found.append({name: one_round(variant, queued) for name, variant in order})
    return found


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}


def ratios(rows: list[dict[str, float]], of: Callable[[dict[str, float], str], float]) -> dict[str, float]:
    """Give the median over rounds of a ratio within each round, for anyattn's variants."""
    names = [name for name in rows[0] if name.startswith("anyattn")]
    return {name: round(statistics.median(of(row, name) for row in rows), 3) for name in names}


SDPA = "sdpa, boolean mask"


def forward(name: str, backends: list[str], rounds: int) -> dict[str, Any]:
    """Time the forward of one call in every variant."""
    call = CALLS[name]
    q, k, v = tensors(call)
    gqa = call[3] != call[4]
    right, scattered = keep_of(call, "right"), keep_of(call, "scattered")
    lengths = right.sum(-1, dtype=torch.int32)
    by_hand = by_sdpa(q, k, v, right)
    variants: dict[str, Variant] = {SDPA: (lambda: None, lambda _: by_hand())}
    for backend in backends:
        told = direct(backend, q, k, v, lengths)
        variants[f"{backend} directly"] = (lambda: None, lambda _, told=told: told())

    def layer(mask: Any, backend: str = "auto") -> Any:
        return anyattn.attention(q, k, v, mask, enable_gqa=gqa, backend=backend)

    def written(mask: Any, key: Tensor) -> Callable[[], Any]:
        """Write to a mask in place, so that what is kept for it has to be made again."""
        values = key.clone()

        def first() -> Any:
            key.copy_(values)
            return mask

        return first

    told = masks.KeyLengths(lengths.clone())
    padding, apart, tensor = masks.KeyPadding(right.clone()), masks.KeyPadding(scattered.clone()), right.clone()
    firsts = {
        "lengths": written(told, told.key),
        "prepared padding": lambda: anyattn.prepare_mask(masks.KeyPadding(right)),
        "padding": written(padding, padding.key),
        "scattered": written(apart, apart.key),
        "tensor": written(tensor[:, None, None, :], tensor),
    }
    for kind, first in firsts.items():
        variants[f"anyattn auto, {kind}"] = (first, layer)
        if kind in ("lengths", "scattered"):
            for backend in backends:
                variants[f"anyattn {backend}, {kind}"] = (first, lambda mask, b=backend: layer(mask, b))
    directly = [f"{backend} directly" for backend in backends]
    found: dict[str, Any] = {"shape": call}
    for way in ("queued", "alone"):
        rows = timed(variants, rounds, queued=way == "queued")
        found[way] = {
            "ms": medians(rows),
            "over the best kernel told the lengths": ratios(
                rows, lambda row, name: row[name] / min(row[one] for one in directly)
            ),
            "sdpa over anyattn": ratios(rows, lambda row, name: row[SDPA] / row[name]),
        }
    found["chosen"] = {
        kind: _named(anyattn.explain(q, k, v, first(), enable_gqa=gqa, backend="auto"))
        for kind, first in firsts.items()
    }
    return found


def _named(decision: Any) -> str:
    return f"{decision.chosen}, {decision.kernel}"


def training(name: str, backend: str, rounds: int) -> dict[str, Any]:
    """Time forward and backward against SDPA with the boolean mask."""
    call = CALLS[name]
    q, k, v = tensors(call, grad=True)
    gqa = call[3] != call[4]
    right, scattered = keep_of(call, "right"), keep_of(call, "scattered")
    flow = torch.randn(call[0], call[1], call[3], call[5], device="cuda", dtype=torch.bfloat16)

    def step(run: Callable[[], Tensor]) -> Any:
        return torch.autograd.grad(run(), (q, k, v), flow)

    by_hand = by_sdpa(q, k, v, right)
    variants: dict[str, Variant] = {SDPA: (lambda: None, lambda _: step(by_hand))}
    for kind, mask in (
        ("lengths", masks.KeyLengths(right.sum(-1, dtype=torch.int32))),
        ("padding", masks.KeyPadding(right)),
        ("scattered", masks.KeyPadding(scattered)),
    ):
        variants[f"anyattn {backend}, {kind}"] = (
            lambda mask=mask: mask.key.copy_(mask.key.clone()),
            lambda _, mask=mask: step(lambda: anyattn.attention(q, k, v, mask, enable_gqa=gqa, backend=backend)),
        )
    rows = timed(variants, rounds, queued=True)
    return {"ms": medians(rows), "sdpa over anyattn": ratios(rows, lambda row, name: row[SDPA] / row[name])}


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
    """Give the figures that are promised, each from the run of that way alone."""
    long = [name for name, call in CALLS.items() if call[2] >= 4096]
    promised: dict[str, Any] = {}
    for way in ("queued", "alone"):
        forwards = {name: found["forward"][name][way] for name in CALLS}
        promised[way] = {
            f"over the best kernel told the lengths, {kind}": {
                name: one["over the best kernel told the lengths"][f"anyattn auto, {kind}"]
                for name, one in forwards.items()
            }
            for kind in ("lengths", "prepared padding", "padding", "scattered", "tensor")
        }
        for kind in ("lengths", "scattered"):
            gains = [forwards[name]["sdpa over anyattn"][f"anyattn auto, {kind}"] for name in long]
            mean = round(statistics.geometric_mean(gains), 3)
            promised[way][f"sdpa over anyattn, geometric mean, S >= 4096, {kind}"] = mean
    return promised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="-")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backends", default="")
    options = parser.parse_args()
    torch.cuda.init()
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
