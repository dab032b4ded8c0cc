"""Write docs/backends.md from the declarations and the known-bad table; a test compares.

python tools/docs/backends.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from anyattn import known_bad, registry
from anyattn.backend import Backend
from anyattn.capabilities import Capabilities
from anyattn.names import KNOWN

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"

HEAD = """# Backends

Made from the declarations by `python tools/docs/backends.py`; a test fails where they differ. A declaration is what
selection goes by: a call outside it is refused with the reason, and `anyattn explain` says which.

The CPU columns are run by the tests (torch 2.13, all laws). The CUDA columns are written from torch's sources and from
measurements on an H100 with torch 2.11; **no run on a GPU has verified them yet** (`tools/gpu/run.py` does that).

"turned dense" means that the kernel has no such mask of its own: it is given a dense mask with exactly that meaning,
and the decision says so.
"""


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _mask(native: bool, caps: Capabilities) -> str:
    return "yes" if native else "turned dense" if caps.boolean else "no"


def _aligned(aligns: frozenset[str], caps: Capabilities) -> str:
    if len(aligns) == 2:
        return "where as many queries as keys are left" if caps.causal_square else "yes"
    if aligns:
        own = next(iter(aligns)).replace("_", " ")
        return f"{own}; other {'turned dense' if caps.boolean else 'where lengths agree'}"
    return "turned dense" if caps.boolean else "no"


def _dims(caps: Capabilities) -> str:
    limit = "any" if caps.head_dim_max >= 1 << 16 else f"<= {caps.head_dim_max}"
    step = "" if caps.head_dim_multiple == 1 else f", multiples of {caps.head_dim_multiple}"
    return limit + step + (", D_v free" if caps.head_dim_v else "")


def _arch(device: str, caps: Capabilities) -> str:
    if device != "cuda" or caps.arch_min is None:
        return device
    low, high = (f"sm{arch[0]}{arch[1]}" if arch else "" for arch in (caps.arch_min, caps.arch_max))
    return f"{device}, {low} to {high}" if high else f"{device}, {low}+"


def rows() -> list[tuple[str, list[str]]]:
    """Give the table by rows: what is asked, and each backend's answer per device."""
    columns: list[tuple[Backend, str, Capabilities]] = []
    for name in registry.BUILTIN:
        backend = registry.get(name)
        assert backend is not None
        columns += [
            (backend, device, caps) for device, caps in backend.declarations.items() if device in ("cpu", "cuda")
        ]
    table: list[tuple[str, list[str]]] = []

    def add(what: str, answers: list[str]) -> None:
        table.append((what, answers))

    every = [caps for _, _, caps in columns]
    add("backend", [f"`{backend.name}`" for backend, _, _ in columns])
    add("device", [_arch(device, caps) for _, device, caps in columns])
    add("dtypes", [", ".join(sorted(str(d).removeprefix("torch.") for d in caps.dtypes)) for caps in every])
    add("head_dim", [_dims(caps) for caps in every])
    add("causal", [_aligned(frozenset(caps.causal), caps) for caps in every])
    add("window", [_aligned(frozenset(caps.window), caps) for caps in every])
    add("key padding, lengths", [_mask(caps.key_mask, caps) for caps in every])
    add("dense boolean", [_yes(caps.boolean) for caps in every])
    add("additive", [_yes(caps.bias) + (", float32 too" if caps.bias_float32 else "") for caps in every])
    add("block mask", [_yes(caps.block) for caps in every])
    add("GQA", [_yes(caps.gqa) for caps in every])
    add("dropout", [_yes(caps.dropout) for caps in every])
    add("softcap", [_yes(caps.softcap) for caps in every])
    add("sinks", ["yes" if caps.sinks else "without gradients" if caps.lse else "no" for caps in every])
    add("scale <= 0", [_yes(caps.scale_any) for caps in every])
    add("lse", [_yes(caps.lse) for caps in every])
    add("gradients", [_yes(caps.backward) + (", of the mask too" if caps.mask_grad else "") for caps in every])
    add("torch.compile", [_yes(caps.compile) for caps in every])
    return table


def page() -> str:
    """Give the whole page."""
    table = rows()
    lines = [HEAD]
    names = table[0][1]
    for first in range(0, len(names), 5):
        part = [(what, answers[first : first + 5]) for what, answers in table]
        for index, (what, answers) in enumerate(part):
            lines.append(f"| {what} | " + " | ".join(answers) + " |")
            if index == 0:
                lines.append("|---" * (len(answers) + 1) + "|")
        lines.append("")
    lines += ["## Known, not built yet", "", "| backend | needs | aliases |", "|---|---|---|"]
    for known in KNOWN:
        if known.name not in registry.BUILTIN:
            aliases = ", ".join(f"`{alias}`" for alias in known.aliases)
            lines.append(f"| `{known.name}` | {known.needs} | {aliases} |")
    lines += ["", "## Kernels known to be wrong or fatal", ""]
    lines += [
        "| kernel | what happens | when | torch | instead | where it is documented |",
        "|---|---|---|---|---|---|",
    ]
    for row in known_bad.TABLE:
        kernels = ", ".join(f"`{name}`" for name in row.backends)
        device = f" ({row.device_type})"
        cells = [kernels + device, row.what, row.when, row.torch or "all", row.instead, row.link]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or with --check compare it."""
    if "--check" in sys.argv:
        return 0 if PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
