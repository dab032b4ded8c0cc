"""The terminal view of the demo."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from anyattn.cli.commands.demo import DemoReport
from anyattn.cli.views.parts import BAD, GOOD, PALE, facts, section, table
from anyattn.demo import BackendRun, ModelResult

_STYLES = {"passed": GOOD, "failed": BAD, "refused": "yellow", "measured": ""}


def show(found: DemoReport) -> RenderableType:
    """Build the view: a line for each model and backend, what was allowed, and where the pictures are."""
    result = found.result
    head = f"{result.device}, {result.dtype}, {result.steps} denoising steps, seed {result.seed}"
    lines = [line for model in result.models for line in _model(model)]
    headings = ("model and backend", "attention calls", "seconds", "latents", "image", "")
    parts: list[RenderableType] = [
        Text(head, style=PALE),
        "",
        table(headings, lines, right=(2, 3, 4), wraps=(1,)),
        "",
        Text("A backend's line: its largest differences from the float64 run. A model's: what is allowed.", style=PALE),
    ]
    whys = [
        (f"{model.title}: {run.backend}", run.reason) for model in result.models for run in model.runs if run.reason
    ]
    if whys:
        parts.append(section("Not passed", facts(whys)))
    verdict = ("Every exact backend stayed within the budget.", GOOD) if result.ok else ("Something is wrong.", BAD)
    parts += ["", Text.assemble(verdict), f"Pictures: {found.sheet}"]
    return Group(*parts)


def _model(model: ModelResult) -> list[Sequence[RenderableType]]:
    budget = (f"{model.budget.latents:.1e}", f"{model.budget.image:.1e}")
    first: Sequence[RenderableType] = (
        Text(model.title, style="bold"),
        Text(f"{model.calls} in float64", style=PALE),
        *(Text(text, style=PALE) for text in (f"{model.truth_seconds:.2f}", *budget, "allowed")),
    )
    return [first, *(_run(run) for run in model.runs)]


def _run(run: BackendRun) -> Sequence[RenderableType]:
    off = ("", "") if run.errors is None else (f"{run.errors.latents:.1e}", f"{run.errors.image:.1e}")
    seconds = "" if run.seconds is None else f"{run.seconds:.2f}"
    kernels = ", ".join(f"{calls} by {kernel}" for kernel, calls in run.kernels)
    return (f"  {run.backend}", kernels or str(run.calls), seconds, *off, Text(run.status, style=_STYLES[run.status]))
