"""Runs of tiny models with eager and with anyattn, and how far apart they may be."""

from __future__ import annotations

from typing import Any

import torch
from transformers_families import VOCAB, Family

import anyattn

LENGTH = 9
PADDING = {"none": (0, 0), "left": (3, 0), "right": (0, 3)}
BUDGET = 5e-6
"""The largest difference, in float32, beside the largest value compared; softmax and products differ in order."""


def token_ids(batch: int = 2, length: int = LENGTH, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def kept(left: int, right: int, batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Make a tokenizer's mask whose first entry is padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return mask


def switch(model: Any, family: Family) -> None:
    """Send a model's attention through anyattn."""
    if family.backend is None:
        model.set_attn_implementation("anyattn")
    else:
        anyattn.set_attention_backend(model, family.backend)


def inputs_of(family: Family, padding: str) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Return what a model is called with, and which rows of its output count."""
    if family.inputs is not None:
        return family.inputs(), None
    given: dict[str, Any] = {"input_ids": token_ids()}
    if family.kind == "seq2seq":
        given["decoder_input_ids"] = token_ids(length=5, seed=6)
    if padding == "none":
        return given, None
    mask = kept(*PADDING[padding])
    given["attention_mask"] = mask
    return given, None if family.kind == "seq2seq" else mask.bool()


def output(model: Any, given: dict[str, Any], rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return a model's first output, in the rows that count."""
    found = model(**given)
    first = found.get("logits_per_image") if "logits_per_image" in found else found[0]
    return first if rows is None else first[rows]


def gradients(model: Any, given: dict[str, Any], rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the gradients of every parameter, for a loss that looks at the rows that count."""
    model.zero_grad()
    out = output(model, given, rows)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (out * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference, beside the largest value."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-3))
