"""Time what a call costs beside the kernel: anyattn, Diffusers' dispatcher, and SDPA called by hand.

All are timed in one run, on tiny CPU tensors, one thread, interleaved in shuffled order; what counts is the ratio of
the extra times over the hand-written call, which shared machines disturb least.

    python benchmarks/overhead.py [--rounds 400] [--json overhead.json]
"""

from __future__ import annotations

import argparse
import contextvars
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import anyattn
from anyattn import masks

B, S, H, D = 1, 16, 2, 16


def cases(device: str) -> dict[str, Callable[[], object]]:
    """Give every timed call by name."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(B, S, H, D, device=device, dtype=dtype) for _ in range(3))
    pad = torch.ones(B, S, dtype=torch.bool, device=device)
    pad[:, S // 2 :] = False
    wide = pad[:, None, None, :]
    key_padding = masks.KeyPadding(pad)
    causal = masks.Causal()
    run = anyattn.plan(anyattn.explain(q, k, v).spec)
    sdpa = F.scaled_dot_product_attention
    attention = anyattn.attention

    def by_hand() -> object:
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def by_hand_mask() -> object:
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), wide).transpose(1, 2)

    inside = contextvars.copy_context()
    inside.run(anyattn.attention_backend("native").__enter__)

    def by_hand_causal() -> object:
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)

    def in_context() -> object:
        with anyattn.attention_backend("native"):
            return attention(q, k, v)

    found: dict[str, Callable[[], object]] = {
        "by hand": by_hand,
        "by hand, mask": by_hand_mask,
        "by hand, causal": by_hand_causal,
        "anyattn": lambda: attention(q, k, v),
        "anyattn, backend=": lambda: attention(q, k, v, backend="native"),
        "anyattn, entering a context": in_context,
        "anyattn, inside a context (+ Context.run)": lambda: inside.run(attention, q, k, v),
        "anyattn, plan": lambda: run(q, k, v),
        "anyattn, mask tensor": lambda: attention(q, k, v, wide),
        "anyattn, KeyPadding": lambda: attention(q, k, v, key_padding),
        "anyattn, Causal object": lambda: attention(q, k, v, causal),
    }
    found.update(diffusers_cases(q, k, v, pad))
    return found


def diffusers_cases(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Give Diffusers' own dispatcher, where it is installed, with its checks off and on."""
    try:
        from diffusers.models import attention_dispatch as dispatch
    except ImportError:
        return {}
    call = dispatch.dispatch_attention_fn
    registry = dispatch._AttentionBackendRegistry

    def checked() -> object:
        registry._checks_enabled = True
        try:
            return call(q, k, v)
        finally:
            registry._checks_enabled = False

    def in_context() -> object:
        with dispatch.attention_backend("native"):
            return call(q, k, v)

    return {
        "diffusers, entering a context": in_context,
        "diffusers": lambda: call(q, k, v),
        "diffusers, checks": checked,
        "diffusers, mask": lambda: call(q, k, v, attn_mask=pad),
    }


def measure(found: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Time every case in every round, in shuffled order; microseconds per call."""
    order = list(found)
    times: dict[str, list[float]] = {name: [] for name in order}
    for run in found.values():
        for _ in range(50):
            run()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            run = found[name]
            start = time.perf_counter_ns()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter_ns() - start) / calls / 1e3)
    return times


def _kind(name: str) -> str:
    """Say which hand-written call a case is compared with."""
    if "mask" in name or "KeyPadding" in name:
        return ", mask"
    return ", causal" if "ausal" in name else ""


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Give medians, and the median of same-round differences to the hand-written call."""
    rows = {}
    for name, values in times.items():
        base = times[f"by hand{_kind(name)}"]
        extra = [value - ground for value, ground in zip(values, base, strict=True)]
        rows[name] = {
            "median_us": statistics.median(values),
            "extra_us": statistics.median(extra),
            "extra_p10_us": statistics.quantiles(extra, n=10)[0],
        }
    return rows


def main() -> None:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = summary(measure(cases(options.device), options.rounds, options.calls))
    print(f"{'call':44}{'median us':>11}{'extra us':>10}{'of diffusers, the same':>24}{'of diffusers, plain':>21}")
    for name, row in rows.items():
        same = rows.get(f"diffusers{_kind(name).removesuffix(', causal')}")
        if "entering" in name:
            same = rows.get("diffusers, entering a context")
        plain = rows.get("diffusers")
        ratios = [f"{row['extra_us'] / other['extra_us']:.2f}" if other else "" for other in (same, plain)]
        print(f"{name:44}{row['median_us']:11.2f}{row['extra_us']:10.2f}{ratios[0]:>24}{ratios[1]:>21}")
    if options.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
        found = {"about": about, "rounds": options.rounds, "calls": options.calls, "rows": rows}
        if options.json == "-":
            print(json.dumps(found))
        else:
            Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
