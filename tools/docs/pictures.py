"""Draw which keys each query may attend to, for every kind of mask, as docs/pictures/*.svg.

Nothing is drawn by hand: each picture is what `anyattn.attention` computes. With queries and keys of zeros all scores
are equal, and with the identity for value the output of a row is the weight of every key, which is 0 where it isn't
allowed.

    python tools/docs/pictures.py [--out docs/pictures]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anyattn
from anyattn import masks

CELL, EDGE = 14, 26
ALLOWED, FORBIDDEN, TEXT = "#3f7fd8", "#9aa0a640", "#80868b"


def weights(rows: int, keys: int, mask: Any = None, **options: Any) -> Tensor:
    """Give the weights `(rows, keys)` of the first batch entry and head."""
    query, key = torch.zeros(1, rows, 1, 16), torch.zeros(1, keys, 1, 16)
    value = torch.eye(keys)[None, :, None]
    out = anyattn.attention(query, key, value, mask, backend="native_math", **options)
    return out[0, :, 0]


def packed_weights(lengths: tuple[int, ...]) -> Tensor:
    """Give the weights of sequences that are packed one after the other, causal within each."""
    total = sum(lengths)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.zeros(total, 1, 16)
    value = torch.eye(total)[:, None]
    longest = max(lengths)
    out = anyattn.attention_varlen(
        query, query, value, starts, starts, longest, longest, is_causal=True, backend="native_math"
    )
    return out[:, 0]


def dense(rows: int, keys: int) -> Tensor:
    """Give a boolean mask of no particular kind."""
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    return ((i + 2 * j) % 5 != 0)[None, None]


PICTURES: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "none": ("no mask", lambda: weights(6, 10)),
    "causal-upper-left": ("is_causal=True", lambda: weights(6, 10, is_causal=True)),
    "causal-lower-right": ('Causal("lower_right")', lambda: weights(6, 10, masks.Causal("lower_right"))),
    "window": ("window=(2, 1)", lambda: weights(10, 10, window=(2, 1))),
    "window-causal": ("window=(3, 0)", lambda: weights(10, 10, window=(3, 0))),
    "window-lower-right": (
        'SlidingWindow(2, 0, "lower_right")',
        lambda: weights(6, 10, masks.SlidingWindow(2, 0, "lower_right")),
    ),
    "key-padding": (
        "KeyPadding(keep)",
        lambda: weights(6, 10, masks.KeyPadding(torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1, 0]]).bool())),
    ),
    "key-lengths": ("KeyLengths([7])", lambda: weights(6, 10, masks.KeyLengths(torch.tensor([7])))),
    "boolean": ("a boolean tensor", lambda: weights(6, 10, dense(6, 10))),
    "bias": ("a bias: -distance / 2", lambda: weights(10, 10, _distance(10))),
    "joined": (
        "Causal() & KeyPadding(keep)",
        lambda: weights(10, 10, masks.Causal() & masks.KeyPadding(torch.tensor([[0, 0, *[1] * 8]]).bool())),
    ),
    "document": (
        "document([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])",
        lambda: weights(10, 10, masks.document(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]]))),
    ),
    "prefix-lm": ("prefix_lm(4)", lambda: weights(10, 10, masks.prefix_lm(4))),
    "varlen": ("attention_varlen of lengths 3, 5, 2, causal", lambda: packed_weights((3, 5, 2))),
}


def _distance(size: int) -> Tensor:
    place = torch.arange(size)
    return (-(place[:, None] - place).abs() / 2)[None, None]


def picture(title: str, found: Tensor) -> str:
    """Draw weights as an SVG: rows are queries, columns are keys, and a darker cell has more weight."""
    rows, keys = found.shape
    width, height = EDGE + keys * CELL + 6, EDGE + rows * CELL + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{_escaped(title)}" font-family="sans-serif" font-size="9" fill="{TEXT}">',
        f"<title>{_escaped(title)}</title>",
        f'<text x="{EDGE}" y="16">key 0 to {keys - 1}</text>',
        f'<text transform="translate(16 {EDGE + rows * CELL}) rotate(-90)">query 0 to {rows - 1}</text>',
    ]
    for row in range(rows):
        largest = float(found[row].max()) or 1.0
        for key in range(keys):
            share = round(float(found[row, key]) / largest, 2)
            fill = f'fill="{ALLOWED}" fill-opacity="{share:g}"' if share else f'fill="{FORBIDDEN}"'
            x, y = EDGE + key * CELL, EDGE + row * CELL
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="2" {fill}/>')
    return "\n".join([*parts, "</svg>", ""])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def drawn() -> dict[str, str]:
    """Draw every picture, by its file's name."""
    return {f"{name}.svg": picture(title, make()) for name, (title, make) in PICTURES.items()}


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in drawn().items():
        (options.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
