"""Time a language model of Transformers as a person runs it: prefill, decoding, packed training; beside its own sdpa.

The model is a Llama of 8B parameters with random weights in bf16 (on a CPU a tiny one). One model is switched between
the ways, outside what is timed, in shuffled order in each round:

- sdpa: Transformers' own, `attn_implementation="sdpa"`
- each backend: `anyattn.set_attention_backend(model, backend)`

Decoding is timed twice: on lengths that were all seen before, and on lengths that no way has seen, as in a
conversation. Some kernels prepare something for each new length.

    python benchmarks/language.py [--device cuda] [--backends auto flash3 native_cudnn] [--rounds 7] [--json FILE]

Every way's result is compared with that of sdpa. `anyattn.record` says which kernels ran.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

import anyattn
from anyattn.errors import AnyattnError

SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"prompt": 8192, "batch": 8, "context": 2048, "new": 32, "packed": (2048, 1024, 512, 512)},
    "cpu": {"prompt": 64, "batch": 2, "context": 16, "new": 4, "packed": (16, 8, 8)},
}
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(device: str) -> nn.Module:
    """Make the model on the device, with random weights."""
    config = transformers.LlamaConfig(**(LLAMA_8B if device == "cuda" else TINY), pad_token_id=0, eos_token_id=None)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


class Task(NamedTuple):
    """Something to time.

    Attributes:
        tokens: How many tokens it works through.
        run: Runs it; its number shifts the lengths, so that two numbers share none.
        is_new: Whether each run gets another number.
    """

    tokens: int
    run: Callable[[int], Any]
    is_new: bool = False


def work_of(model: Any, device: str) -> dict[str, Task]:
    """Give each task by name."""
    size, words = SIZES[device], model.config.vocab_size
    prompt = torch.randint(1, words, (1, size["prompt"]), device=device)
    context = torch.randint(1, words, (size["batch"], 2 * size["context"]), device=device)
    lengths = size["packed"]
    packed = torch.randint(1, words, (1, sum(lengths)), device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]

    def prefill(number: int) -> Any:
        with torch.no_grad():
            return model(prompt, logits_to_keep=1, use_cache=False).logits

    def decode(number: int) -> Any:
        new, start = size["new"], size["context"] + number * size["new"]
        with torch.no_grad():
            return model.generate(context[:, :start], max_new_tokens=new, min_new_tokens=new, do_sample=False)

    def train(number: int) -> Any:
        model.zero_grad(set_to_none=True)
        loss = model(packed, position_ids=positions, labels=packed, use_cache=False).loss
        loss.backward()
        return loss.detach()

    decoded = size["batch"] * size["new"]
    return {
        "prefill": Task(prompt.numel(), prefill),
        "decode": Task(decoded, decode),
        "decode, new lengths": Task(decoded, decode, is_new=True),
        "train, packed": Task(packed.numel(), train),
    }


def switch(model: nn.Module, way: str, before: list[str]) -> None:
    """Bring the model into a way."""
    if before[0] != "sdpa":
        anyattn.reset_attention_backend(model)
    before[0] = way
    if way != "sdpa":
        anyattn.set_attention_backend(model, way)


def timed(run: Callable[[int], Any], number: int, device: str) -> float:
    """Give the milliseconds of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(model: nn.Module, task: Task, ways: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Run a task in every way, and give times, kernels and how far results are from sdpa's."""
    found: dict[str, Any] = {}
    before, results = ["sdpa"], {}
    for way in list(ways):
        switch(model, way, before)
        try:
            with anyattn.record() as calls:
                results[way] = task.run(0)
        except AnyattnError as error:
            found[way] = {"refused": f"{type(error).__name__}: {error}"[:300]}
            ways = [one for one in ways if one != way]
            continue
        kernels: dict[str, int] = {}
        for call in calls:
            kernels[f"{call.chosen}:{call.kernel}"] = kernels.get(f"{call.chosen}:{call.kernel}", 0) + 1
        one, other = results[way].float(), results["sdpa"].float()
        error = float((one - other).norm() / other.norm())
        same = float((one == other).float().mean())
        found[way] = {"kernels": kernels, "relative_difference_to_sdpa": error, "equal_to_sdpa": same}
    times: dict[str, list[float]] = {way: [] for way in ways}
    numbers = itertools.count(1) if task.is_new else itertools.repeat(0)
    for _ in range(rounds):
        for way in random.sample(ways, len(ways)):
            switch(model, way, before)
            times[way].append(timed(task.run, next(numbers), device))
    switch(model, "sdpa", before)
    for way in ways:
        ratios = [sdpa / own for sdpa, own in zip(times["sdpa"], times[way], strict=True)]
        found[way] |= {"median_ms": statistics.median(times[way]), "times_as_fast": statistics.median(ratios)}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(SIZES))
    parser.add_argument("--backends", nargs="+", default=["auto", "native"])
    parser.add_argument("--tasks", nargs="+", default=["prefill", "decode", "decode, new lengths", "train, packed"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = build(options.device)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "device": machine}
    report: dict[str, Any] = {"about": versions, "rounds": options.rounds, "tasks": {}}
    for name, task in work_of(model, options.device).items():
        if name not in options.tasks:
            continue
        rows = measure(model, task, ["sdpa", *options.backends], options.rounds, options.device)
        report["tasks"][name] = {"tokens": task.tokens, "ways": rows}
        for way, row in rows.items():
            if "refused" in row:
                print(f"{name:19s} {way:14s} refused: {row['refused'][:120]}")
                continue
            speed = task.tokens / row["median_ms"] * 1e3
            print(
                f"{name:19s} {way:14s} {row['median_ms']:9.2f} ms {speed:10.0f} tokens/s "
                f"{row['times_as_fast']:.3f} x sdpa, difference {row['relative_difference_to_sdpa']:.1e}",
                flush=True,
            )
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
