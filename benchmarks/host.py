"""Time what a call takes of the host, beside the same kernel called by hand.

Calls are queued: the tensors are so small that the device is always done first, and nothing waits for it within a
round. All cases are timed in one run, in random order, without gradients; a case's extra time is the median over
rounds of its difference from the call by hand in the same round. Kernels that aren't installed are left out.

    python benchmarks/host.py [--rounds 60] [--calls 50] [--json host.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import anyattn
from anyattn import masks

B, S, H, D = 2, 64, 4, 64
Call = Callable[[], object]


def cases(device: str) -> dict[str, dict[str, Call]]:
    """Give the timed calls: by kernel and kind, and of each kind `by hand` and the others."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(B, S, H, D, device=device, dtype=dtype) for _ in range(3))
    found = {**native_cases(q, k, v), **decoding_cases(q, k, v)}
    if device == "cuda":
        found.update(flash_cases(q, k, v))
        found.update(other_cases(q, k, v))
    return found


def native_cases(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, dict[str, Call]]:
    """Give the calls of torch's SDPA."""
    sdpa, attention = F.scaled_dot_product_attention, anyattn.attention
    swapped = [tensor.transpose(1, 2).contiguous() for tensor in (q, k, v)]
    keep = torch.arange(S, device=q.device) < torch.tensor([[S], [S // 2]], device=q.device)
    wide, padding = keep[:, None, None, :], masks.KeyPadding(keep)
    bias = torch.randn(1, H, S, S, device=q.device, dtype=q.dtype)
    plain, pinned = _Attends(), _Attends()
    anyattn.set_attention_backend(pinned, "native")

    def by_hand(mask: torch.Tensor | None = None, **options: Any) -> object:
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, **options).transpose(1, 2)

    def in_block() -> object:
        with anyattn.attention_backend("native"):
            return attention(q, k, v)

    return {
        "native": {
            "by hand": lambda: sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2),
            "attention": lambda: attention(q, k, v),
            "backend=": lambda: attention(q, k, v, backend="native"),
            "entering a block": in_block,
        },
        "native, in a module": {"by hand": lambda: plain(q, k, v), "pinned": lambda: pinned(q, k, v)},
        "native, drop-in": {
            "by hand": lambda: sdpa(*swapped),
            "scaled_dot_product_attention": lambda: anyattn.scaled_dot_product_attention(*swapped),
        },
        "native, padding": {"by hand": lambda: by_hand(wide), "KeyPadding": lambda: attention(q, k, v, padding)},
        "native, bias": {"by hand": lambda: by_hand(bias), "tensor": lambda: attention(q, k, v, bias)},
        "native, causal": {
            "by hand": lambda: by_hand(is_causal=True),
            "is_causal": lambda: attention(q, k, v, is_causal=True),
        },
    }


class _Attends(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
        return anyattn.attention(q, k, v)


def decoding_cases(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, dict[str, Call]]:
    """Give one query on a number of keys that grows with every call, as a language model decodes."""
    most = 1 << 16
    keys = torch.zeros(1, H, most, D, device=q.device, dtype=q.dtype)
    query = q[:1, :1].transpose(1, 2)
    length = [0]

    def grown() -> torch.Tensor:
        length[0] = length[0] % (most - 1) + 1
        return keys[:, :, : length[0]]

    def by_hand() -> object:
        key = grown()
        return F.scaled_dot_product_attention(query, key, key)

    def ours() -> object:
        key = grown()
        return anyattn.scaled_dot_product_attention(query, key, key)

    return {"decoding, a new length each": {"by hand": by_hand, "scaled_dot_product_attention": ours}}


FLASH = {
    "flash2": ("flash_attn", {}),
    "flash3": ("fa3_fwd_interface", {}),
    "flash4": ("flash_attn.cute", {}),
}


def flash_cases(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, dict[str, Call]]:
    """Give the calls of FlashAttention 2 to 4: dense, and with lengths where the function takes them."""
    found: dict[str, dict[str, Call]] = {}
    lengths = torch.tensor([S, S // 2], device=q.device, dtype=torch.int32)
    for backend, (module_name, options) in FLASH.items():
        module = _module(module_name)
        if not hasattr(module, "flash_attn_func"):
            continue
        found[backend] = _pair(backend, (q, k, v), lambda m=module, o=options: m.flash_attn_func(q, k, v, **o))
        if backend == "flash2":
            continue

        def with_lengths(m: Any = module) -> object:
            return m.flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=S, max_seqlen_k=S, seqused_k=lengths
            )

        ours = {"KeyLengths": masks.KeyLengths(lengths)}
        found[f"{backend}, lengths"] = _pair(backend, (q, k, v), with_lengths, ours)
    return found


def other_cases(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, dict[str, Call]]:
    """Give the calls of SageAttention and xFormers."""
    found: dict[str, dict[str, Call]] = {}
    sage = _module("sageattention")
    if hasattr(sage, "sageattn"):
        longer = [torch.randn(B, 128, H, D, device=q.device, dtype=q.dtype) for _ in range(3)]
        found["sage"] = _pair("sage", tuple(longer), lambda: sage.sageattn(*longer, tensor_layout="NHD"))
    xformers = _module("xformers.ops")
    if hasattr(xformers, "memory_efficient_attention"):
        found["xformers"] = _pair("xformers", (q, k, v), lambda: xformers.memory_efficient_attention(q, k, v))
    return found


def _pair(backend: str, tensors: Any, by_hand: Call, masked: dict[str, Any] | None = None) -> dict[str, Call]:
    swapped = [tensor.transpose(1, 2) for tensor in tensors]
    found: dict[str, Call] = {"by hand": by_hand}
    if masked is None:
        found["attention"] = lambda: anyattn.attention(*tensors, backend=backend)
        found["drop-in"] = lambda: anyattn.scaled_dot_product_attention(*swapped, backend=backend)
    for name, mask in (masked or {}).items():
        found[name] = lambda mask=mask: anyattn.attention(*tensors, mask, backend=backend)  # type: ignore[misc]
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def measure(found: dict[str, dict[str, Call]], rounds: int, calls: int, device: str) -> dict[str, Any]:
    """Time every case in every round, in random order; microseconds per call."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    flat = [(group, name, call) for group, kinds in found.items() for name, call in kinds.items()]
    times: dict[tuple[str, str], list[float]] = {(group, name): [] for group, name, _ in flat}
    for _, _, call in flat:
        for _ in range(5):
            call()
    for _ in range(rounds):
        random.shuffle(flat)
        for group, name, call in flat:
            number = calls if "decoding" not in group else max(1, calls // 10)
            wait()
            start = time.perf_counter()
            for _ in range(number):
                call()
            times[group, name].append((time.perf_counter() - start) / number * 1e6)
    rows: dict[str, Any] = {}
    for (group, name), taken in times.items():
        extra = [mine - hand for mine, hand in zip(taken, times[group, "by hand"], strict=True)]
        row = {"median_us": round(statistics.median(taken), 2), "extra_us": round(statistics.median(extra), 2)}
        rows.setdefault(group, {})[name] = row
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        rows = measure(cases(device), arguments.rounds, arguments.calls, device)
    for group, kinds in rows.items():
        for name, row in kinds.items():
            print(f"{group:30} {name:30} {row['median_us']:9.2f} us  {row['extra_us']:+8.2f} us")
    if arguments.json:
        device_name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        about = {"device": device_name, "torch": torch.__version__, "python": platform.python_version()}
        shape = {"batch": B, "seqlen": S, "heads": H, "head_dim": D}
        data = {"about": about, "shape": shape, "rounds": arguments.rounds, "calls": arguments.calls, "rows": rows}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
