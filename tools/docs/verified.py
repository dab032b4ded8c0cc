"""Read what was run from the JSON files under verified/: which backend, where, how many laws, and what came of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """The laws of one backend in one file.

    Attributes:
        backend: Its name.
        source: The file, as folder/name.
        device_type: The type of device.
        device: What it is.
        torch: The version of torch.
        executed: How many cases were executed; those about refusals run no kernel and aren't among them.
        worst: The largest error among those that passed, in multiples of what is allowed.
        broken: How many broke a law.
        died: How many laws ended with their process.
        double: Whether a contract double ran in the kernel's place.
        note: What the file says of itself.
    """

    backend: str
    source: str
    device_type: str
    device: str
    torch: str
    executed: int
    worst: float
    broken: int
    died: int
    double: bool
    note: str

    @property
    def outcome(self) -> str:
        """Say what came of it in a few words."""
        if not self.executed:
            return "nothing executed"
        bad = [f"{self.broken} broken"] if self.broken else []
        bad += [f"{self.died} died"] if self.died else []
        return f"{self.executed} executed, {' and '.join(bad) or 'none broken'}"


def runs(folder: Path) -> list[Run]:
    """Read every run of laws, in the order of the files' names; other files (demo, overhead) hold none."""
    return [run for path in sorted(folder.glob("*/*.json")) for run in _of_file(path, json.loads(path.read_text()))]


def _of_file(path: Path, data: Any) -> Iterator[Run]:
    source = f"{path.parent.name}/{path.name}"
    if not isinstance(data, Mapping):
        return
    if isinstance(data.get("backends"), list):  # anyattn verify --json
        for row in data["backends"]:
            if "laws" in row:
                yield _run(row["backend"], row, source, data["device"], data["machine"], data["torch"], "")
    elif isinstance(data.get("laws"), Mapping) and isinstance(data.get("about"), Mapping):  # tools/gpu/run.py
        about = {"device": "cuda", "devices": (), "torch": "?", **data["about"]}
        kind = about["device"].partition(":")[0]
        names = [device["name"] for device in about["devices"] if device["type"] == kind]
        for name, row in data["laws"].items():
            if isinstance(row, Mapping) and "laws" in row:
                note = str(data.get("commit", ""))
                yield _run(name, row, source, kind, names[0] if names else kind, about["torch"], note)


def _run(name: str, row: Mapping[str, Any], source: str, kind: str, device: str, torch_version: str, note: str) -> Run:
    laws = row["laws"]
    pairs = list(laws.items()) if isinstance(laws, Mapping) else [(law["law"], law) for law in laws]
    counted = [law for name, law in pairs if name != "rejected"]
    failures = [failure for _, law in pairs for failure in law.get("failures", ())]
    return Run(
        backend=name,
        source=source,
        device_type=kind,
        device=device,
        torch=torch_version,
        executed=sum(law.get("run", 0) for law in counted),
        worst=max((float(law.get("worst", 0.0)) for law in counted), default=0.0),
        broken=sum(int(failure.get("cases", 1)) for failure in failures),
        died=sum("outcome" in law for _, law in pairs),
        double=row.get("ran", "kernel") != "kernel",
        note=note,
    )
