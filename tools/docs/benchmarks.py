"""Write docs/benchmarks.md and its plots from the runs under verified/.

python tools/docs/benchmarks.py [--out docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
H200 = "h200-torch-2.11.0"
BAR, ROW, LABEL = 260, 18, 190
COLOURS = ("#3f7fd8", "#9aa0a6")


def run_of(name: str) -> dict[str, Any]:
    """Read a run."""
    found: dict[str, Any] = json.loads((ROOT / "verified" / H200 / f"{name}.json").read_text(encoding="utf-8"))
    return found


def bars(title: str, rows: list[tuple[str, float]], unit: str) -> str:
    """Draw horizontal bars as an SVG."""
    largest, height = max(value for _, value in rows), 30 + len(rows) * ROW
    width = LABEL + BAR + 80
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}" font-family="sans-serif" font-size="11" fill="#80868b">',
        f'<text x="0" y="14" font-weight="bold">{title}</text>',
    ]
    for index, (label, value) in enumerate(rows):
        y = 24 + index * ROW
        colour = COLOURS["stock" in label or "sdpa" in label or "by hand" in label]
        length = max(1, round(BAR * value / largest))
        parts.append(f'<text x="{LABEL - 6}" y="{y + 11}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{LABEL}" y="{y}" width="{length}" height="{ROW - 4}" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{LABEL + length + 6}" y="{y + 11}">{value:g} {unit}</text>')
    return "\n".join([*parts, "</svg>", ""])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write a table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def models() -> tuple[list[str], dict[str, str]]:
    """Write the section of whole steps of Diffusers' models."""
    run, names = run_of("pinned_backends"), {"sdxl": "SDXL 1024²", "sd15": "SD 1.5", "flux": "FLUX 1024²"}
    ways = {"stock": "stock Diffusers", **{f"pinned, {b}": b for b in ("native", "flash3", "auto")}}
    rows = [
        [
            names[model],
            *(f"{found[way]['median_ms']:.1f} ms ({found[way]['round_ratio']:.3f})" for way in ways),
        ]
        for model, found in run["models"].items()
    ]
    text = [
        "## A step of Diffusers' models",
        "",
        f"Full size, bf16, random weights, on an {run['about']['name']} with torch {run['about']['torch']} and",
        f"Diffusers {run['about']['diffusers']}; {run['rounds']} rounds in random order, commit {run['commit']}.",
        "In parentheses: the median ratio to stock in one round.",
        "`python benchmarks/pinned.py --device cuda --models sdxl sd15 flux --backends native flash3 auto`",
        "",
        *table(["model", *ways.values()], rows),
        "![A step of FLUX](pictures/bench-flux.svg)",
        "",
    ]
    flux = [(label, round(run["models"]["flux"][way]["median_ms"], 1)) for way, label in ways.items()]
    return text, {"bench-flux.svg": bars("A step of FLUX 1024²", flux, "ms")}


def language() -> tuple[list[str], dict[str, str]]:
    """Write the section of a Llama of 8B parameters."""
    runs = [run_of("language"), run_of("language_decode")]
    about, ways, rows = runs[0]["about"], ("sdpa", "auto", "flash3", "native"), []
    for run in runs:
        for task, found in run["tasks"].items():
            if task == "decode" and run is runs[0]:
                continue  # measured anew
            cells = []
            for way in ways:
                one = found["ways"].get(way, {})
                cells.append(
                    f"{one['median_ms']:.0f} ms ({one['times_as_fast']:.2f} x)" if "median_ms" in one else "refused"
                )
            rows.append([task, *cells, run["commit"]])
    text = [
        "## A Llama of 8B parameters",
        "",
        f"Transformers {about['transformers']}, bf16, random weights, on an {about['device']},",
        f"torch {about['torch']}; {runs[0]['rounds']} rounds in random order. In parentheses: how many times",
        'as fast as `attn_implementation="sdpa"`.',
        "`python benchmarks/language.py --device cuda --backends auto native flash3`",
        "",
        *table(["task", *ways, "commit"], rows),
        "With new lengths, torch's own pick (cuDNN) prepares itself for each length of the cache; `auto` takes kernels",
        "that don't.",
        "The two runs were on hosts of different speed: compare within a row.",
        "",
        "![Decoding at new lengths](pictures/bench-decode.svg)",
        "",
    ]
    new = runs[1]["tasks"]["decode, new lengths"]["ways"]
    drawn = bars("Decoding at new lengths", [(way, round(new[way]["median_ms"])) for way in ways], "ms")
    return text, {"bench-decode.svg": drawn}


def decoding() -> list[str]:
    """Write the section of single decoding calls."""
    run = run_of("decoding")
    rows = []
    for call in run["calls"]:
        one = call["backends"]
        heads = f"{call['heads']}/{call['kv_heads']}"
        shape = f"{call['batch']} x {heads} x {call['head_dim']}, {call['seqlen_q']} on {call['seqlen_kv']}"
        rows.append(
            [
                shape,
                *(
                    f"{one[b]['device_us']:.1f} us, {one[b]['new_length_ms']:.1f} ms"
                    for b in ("native", "native_flash", "flash3")
                ),
            ]
        )
    return [
        "## Decoding calls",
        "",
        f"Time on the device, and of a call at a length that is new, host included; {run['about']['device']}, torch",
        f"{run['about']['torch']}, commit {run['commit']}. Batch x heads/key heads x head_dim, queries on keys.",
        "`python benchmarks/decoding.py`",
        "",
        *table(["call", "native (cuDNN)", "native_flash", "flash3"], rows),
    ]


def host() -> tuple[list[str], dict[str, str]]:
    """Write the section of what a call takes of the host."""
    run = run_of("host")
    rows = [
        [group, name, f"{row['median_us']:.1f} us", f"{row['extra_us']:+.1f} us"]
        for group, kinds in run["rows"].items()
        for name, row in kinds.items()
    ]
    text = [
        "## What a call takes of the host",
        "",
        f"{run['about']['device']}, torch {run['about']['torch']}, tiny tensors, queued, without gradients; extra is",
        "the median difference from the call by hand in the same round.",
        f"Commit {run['commit']}; {run['note']}.",
        "`python benchmarks/host.py`",
        "",
        *table(["call", "way", "median", "more than by hand"], rows),
        "![FlashAttention-3 by hand and through anyattn](pictures/bench-host.svg)",
        "",
    ]
    flash3 = [
        (f"{group}: {name}", row["median_us"])
        for group in ("flash3", "flash3, lengths")
        for name, row in run["rows"][group].items()
    ]
    return text, {"bench-host.svg": bars("FlashAttention-3, host time of a call", flash3, "us")}


def pages() -> dict[str, str]:
    """Make the page and its pictures, by path under docs/."""
    head = [
        "# What was measured",
        "",
        "Made by `tools/docs/benchmarks.py` from the runs under `verified/`. [What was checked](backends.md) is on the",
        "backends' page, and the README has what padded calls take.",
        "",
    ]
    sections, pictures = [head], {}
    for text, drawn in (models(), language(), (decoding(), {}), host()):
        sections.append(text)
        pictures.update({f"pictures/{name}": svg for name, svg in drawn.items()})
    return {"benchmarks.md": "\n".join(line for section in sections for line in section).rstrip() + "\n", **pictures}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    for name, text in pages().items():
        (options.out / name).parent.mkdir(parents=True, exist_ok=True)
        (options.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
