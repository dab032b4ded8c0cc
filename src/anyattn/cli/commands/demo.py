"""`anyattn demo`: real Diffusers pipelines through every backend, and their pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from anyattn import demo as demos
from anyattn.cli.reports import Progress, Step, UsageError
from anyattn.cli.words import checked_device

__all__ = ["DemoReport", "demo"]

SHEET = "contact_sheet.png"
"""The file that `demo` writes into its folder."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo found, and where its pictures are.

    Attributes:
        result: Each model through each backend.
        sheet: The contact sheet.
    """

    result: demos.DemoResult
    sheet: Path

    @property
    def exit_code(self) -> int:
        """0 if every model ran, and no exact backend left the error budget or broke; else 1."""
        return 0 if self.result.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {**self.result.to_dict(), "sheet": str(self.sheet)}


def demo(
    folder: Path,
    *,
    models: Sequence[str] = (),
    backends: Sequence[str] = (),
    device: str | None = None,
    dtype: str = "float32",
    steps: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> DemoReport:
    """Run the demo, and write the contact sheet.

    Args:
        folder: Where the contact sheet goes; made if it doesn't exist.
        models: Which models; empty is all.
        backends: Which backends, by name or alias; empty is every exact one that can run.
        device: Where; None is the CUDA device if there is one, else the CPU.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        steps: Denoising steps.
        seed: Random seed of weights and inputs.
        progress: Called for each run.

    Raises:
        UsageError: If there is no such model, device or dtype, or the folder is a file.
        MissingExtraError: If the packages of `anyattn[demo]` aren't installed.
        UnknownBackendError: If a backend has no such name.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: a file has that name; give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror or error}; give a folder that can be written.") from error
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"--dtype {dtype}: no such dtype; write float32, bfloat16 or float16.")

    def report_progress(step: demos.Progress) -> None:
        if progress is not None:
            progress(Step(f"{step.model}: {step.run}" if step.model else "done", step.done, step.total))

    result = demos.run_demo(
        cast("Sequence[demos.ModelName]", tuple(models) or demos.MODELS),
        tuple(backends) or None,
        device=checked_device(device),
        dtype=found,
        steps=steps,
        seed=seed,
        progress=report_progress,
    )
    return DemoReport(result, demos.write_contact_sheet(result, folder / SHEET))
