"""Write docs/backends.md and docs/backends/ from the declarations, the known-bad table and verified/; a test compares.

python tools/docs/backends.py [--check]
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyattn.backend.capabilities import Capabilities
from anyattn.backend.known_bad import table as known_bad
from anyattn.backend.protocol import Backend
from anyattn.selection import registry

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]

from verified import Run
from verified import runs as read_runs

from doubles import DOUBLES

VERIFIED = Path(__file__).parents[2] / "verified"
PAGE = Path(__file__).parents[2] / "docs" / "backends.md"

HEAD = """# Backends

Made from the declarations and from the files under `verified/` by `python tools/docs/backends.py`; a test fails where
they differ. A declaration is what selection goes by: a call outside it is refused with the reason, and `anyattn
explain` says which.

"turned dense" means that the kernel has no such mask of its own: it is given a dense mask with exactly that meaning,
and the decision says so. "padded" means that packed sequences are padded for it; a native entry may be for some calls
alone (native and native_flash on CUDA, xformers, npu), and the others are padded: the decision says that too. `sage`
and `sage_int8_fp16_triton` take packed sequences and key masks to a function of their own, which computes in int8 on
sm80 to sm103, without lse.

"verified" is what the files under `verified/` show, each of which names its device, versions and counts. A "contract
double" is a fake of the kernel's package with its conventions, which the tests run on a CPU: it proves the adapter, and
says nothing of the kernel.
"""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclass(frozen=True)
class Row:
    """One backend on the types of device for which it declares the same."""

    backend: Backend
    devices: tuple[str, ...]
    caps: Capabilities


def built_rows() -> list[Row]:
    """Give a row for each backend and distinct declaration, in the order in which tables list them."""
    made = []
    for _, backend in registry.known(registry.BUILTIN):
        by_caps: dict[Capabilities, list[str]] = {}
        for device, caps in backend.declarations.items():
            if device == "meta":  # shapes alone
                continue
            by_caps.setdefault(caps, []).append(device)
        made += [Row(backend, tuple(devices), caps) for caps, devices in by_caps.items()]
    return made


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _name(row: Row) -> str:
    return f"`{row.backend.name}`"


def _device(row: Row) -> str:
    found = []
    low, high = row.caps.arch_min, row.caps.arch_max
    for device in row.devices:
        text = device
        if device == "cuda" and low is not None:
            upto = "+" if high is None else "" if high == low else f" to sm{high[0]}{high[1]}"
            text += f" sm{low[0]}{low[1]}{upto}"
        if device == "cuda" and row.caps.rocm:
            text += " (AMD too)"
        found.append(text)
    return ", ".join(found)


def _dtypes(row: Row) -> str:
    names = sorted(str(dtype).removeprefix("torch.") for dtype in row.caps.dtypes)
    inputs = ", ".join(_DTYPES.get(name, name) for name in names)
    return inputs if row.caps.exact else f"{inputs}, computed in {row.caps.quantised or 'less'}"


def _dims(row: Row) -> str:
    caps = row.caps
    limit = "any" if caps.head_dim_max >= 1 << 16 else f"<= {caps.head_dim_max}"
    if caps.head_dims:
        limit = "; ".join(f"sm{dims.major}x: {dims}" for dims in caps.head_dims)
    step = "" if caps.head_dim_multiple == 1 else f", multiples of {caps.head_dim_multiple}"
    return limit + step + (", D_v free" if caps.head_dim_v else "")


def _masks(row: Row) -> str:
    caps = row.caps
    own = {
        "causal": bool(caps.causal),
        "window": bool(caps.window),
        "keys": caps.key_mask,
        "boolean": caps.boolean,
        "additive": caps.bias,
        "block": caps.block,
    }
    said = ", ".join(name for name, has in own.items() if has) or "none"
    rest = [name for name in ("causal", "window", "keys") if not own[name]]
    return said + (f"; {', '.join(rest)} turned dense" if rest and caps.boolean else "")


def _aligned(aligns: frozenset[str], caps: Capabilities) -> str:
    if len(aligns) == 2:
        return "where as many queries as keys are left" if caps.causal_square else "yes"
    if not aligns:
        return "turned dense" if caps.boolean else "no"
    own = next(iter(aligns)).replace("_", " ")
    if caps.realigns:
        other = "said so where that is exact" + (", else turned dense" if caps.boolean else "")
    else:
        other = "turned dense" if caps.boolean else "where lengths agree"
    return f"{own}; other {other}"


def _keys(row: Row) -> str:
    return "yes" if row.caps.key_mask else "turned dense" if row.caps.boolean else "no"


def _sinks(caps: Capabilities) -> str:
    return "yes" if caps.sinks else "without gradients" if caps.lse else "no"


def _gradients(row: Row) -> str:
    return _yes(row.caps.backward) + (", of the mask too" if row.caps.mask_grad else "")


def _verified(row: Row, runs: Sequence[Run]) -> str:
    kernels = [
        run
        for run in runs
        if run.backend == row.backend.name and run.device_type in row.devices and run.executed and not run.double
    ]
    if kernels:
        said = (f"{run.device}, torch {run.torch}: {run.outcome}" for run in kernels)
        return "; ".join(said) + (" (see below)" if any(run.broken or run.died for run in kernels) else "")
    return "contract double in CI alone" if row.backend.name in DOUBLES else "never run"


MAIN: Mapping[str, Callable[[Row], str]] = {
    "backend": _name,
    "aliases": lambda row: ", ".join(f"`{alias}`" for alias in row.backend.aliases) or "-",
    "needs": lambda row: row.backend.needs,
    "device": _device,
    "dtypes": _dtypes,
    "head_dim": _dims,
    "masks of its own": _masks,
    "gradients": _gradients,
    "lse": lambda row: _yes(row.caps.lse),
    "varlen": lambda row: "native entry" if row.caps.varlen else "padded",
    "GQA": lambda row: _yes(row.caps.gqa),
    "compile": lambda row: _yes(row.caps.compile),
    "CUDA graph": lambda row: _yes(row.caps.cuda_graph) if "cuda" in row.devices else "-",
}

DETAILS: Mapping[str, Callable[[Row], str]] = {
    "backend": _name,
    "device": lambda row: ", ".join(row.devices),
    "causal": lambda row: _aligned(frozenset(row.caps.causal), row.caps),
    "window": lambda row: _aligned(frozenset(row.caps.window), row.caps),
    "key padding, lengths": _keys,
    "additive": lambda row: _yes(row.caps.bias) + (", float32 too" if row.caps.bias_float32 else ""),
    "rows without a key": lambda row: _yes(row.caps.dead_rows),
    "dropout": lambda row: _yes(row.caps.dropout),
    "softcap": lambda row: _yes(row.caps.softcap),
    "sinks": lambda row: _sinks(row.caps),
    "scale <= 0": lambda row: _yes(row.caps.scale_any),
    "deterministic": lambda row: _yes(row.caps.deterministic),
}


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Write a table of Markdown."""
    made = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    made += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return [*made, ""]


def page(rows: Sequence[Row] | None = None, runs: Sequence[Run] | None = None) -> str:
    """Give the whole page."""
    rows = built_rows() if rows is None else rows
    runs = read_runs(VERIFIED) if runs is None else runs
    main = [[*(cell(row) for cell in MAIN.values()), _verified(row, runs)] for row in rows]
    lines = [HEAD, *table((*MAIN, "verified"), main)]
    lines += ["## What else each takes", ""]
    lines += table(tuple(DETAILS), ([cell(row) for cell in DETAILS.values()] for row in rows))
    lines += ["## What was run", "", "Errors are multiples of what is allowed: 1 is the limit.", ""]
    lines += table(
        ("backend", "what ran", "on", "torch", "laws", "worst error", "file"),
        (
            (
                f"`{run.backend}`",
                "contract double" if run.double else "kernel",
                run.device,
                run.torch,
                run.outcome,
                f"{run.worst:.2f}",
                f"`verified/{run.source}`" + (f" (commit {run.note})" if run.note else ""),
            )
            for run in sorted(runs, key=lambda run: _place(run.backend))
            if run.executed
        ),
    )
    lines += ["## Kernels known to be wrong or fatal", ""]
    lines += table(
        ("kernel", "what happens", "when", "torch", "instead", "where it is documented"),
        (
            (
                ", ".join(f"`{name}`" for name in row.backends) + f" ({row.device_type})",
                row.what,
                row.when,
                row.torch or "all",
                row.instead,
                row.link,
            )
            for row in known_bad.TABLE
        ),
    )
    return "\n".join(lines).rstrip("\n") + "\n"


def family_page(family: str, rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """Give the page of one family of backends: how each is had, what it takes, and what was run."""
    names = list(dict.fromkeys(row.backend.name for row in rows))
    lines = [f"# {family}", ""]
    summary = (inspect.getmodule(type(rows[0].backend)).__doc__ or "").split("\n\n")[0].replace("\n", " ")
    lines += [
        summary,
        "",
        "Made from the declarations by `tools/docs/backends.py`, like [the tables](../backends.md).",
        "",
    ]
    for name in names:
        own = [row for row in rows if row.backend.name == name]
        lines += _section(name, own, runs)
    bad = [row for row in known_bad.TABLE if set(row.backends) & set(names)]
    if bad:
        lines += ["## Known to be wrong or fatal", ""]
        cells = (
            (", ".join(f"`{one}`" for one in row.backends), row.what, row.when, row.instead, row.link) for row in bad
        )
        lines += table(("kernel", "what happens", "when", "instead", "where it is documented"), cells)
    return "\n".join(lines).rstrip("\n") + "\n"


def _section(name: str, rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    backend = rows[0].backend
    said = (inspect.getdoc(type(backend)) or "").split("\n\n")[0].replace("\n", " ")
    lines = [f"## {name}", "", said, ""]
    if backend.install:
        lines += ["```console", backend.install, "```", ""]
    lines += ["```text", f'anyattn.attention(query, key, value, backend="{name}")', "```", ""]
    facts = {**{key: cell for key, cell in MAIN.items() if key != "backend"}, **DETAILS}
    facts = {key: cell for key, cell in facts.items() if key not in ("backend", "device")}
    heads = ("", *(_device(row) for row in rows))
    lines += table(heads, ((key, *(cell(row) for row in rows)) for key, cell in facts.items()))
    own = [run for run in runs if run.backend == name and run.executed and not run.double]
    if not own:
        return [*lines, "The kernel was never run for this; a contract double stands in, in the tests.", ""]
    cells = ((run.device, run.torch, run.outcome, f"{run.worst:.2f}", f"`verified/{run.source}`") for run in own)
    return [*lines, *table(("run on", "torch", "laws", "worst error (1 is the limit)", "file"), cells)]


def pages() -> dict[Path, str]:
    """Give every page by its path."""
    rows, runs = built_rows(), read_runs(VERIFIED)
    found = {PAGE: page(rows, runs)}
    for family in dict.fromkeys(row.backend.family for row in rows):
        own = [row for row in rows if row.backend.family == family]
        found[PAGE.with_suffix("") / f"{family}.md"] = family_page(family, own, runs)
    return found


def _place(name: str) -> int:
    names = list(registry.BUILTIN)
    return names.index(name) if name in names else len(names)


def main() -> int:
    """Write the pages, or with --check compare them."""
    made = pages()
    if "--check" in sys.argv:
        there = set(PAGE.with_suffix("").glob("*.md"))
        return 0 if there | {PAGE} == set(made) and all(path.read_text() == text for path, text in made.items()) else 1
    for path, text in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
