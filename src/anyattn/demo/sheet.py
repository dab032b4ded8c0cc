"""The contact sheet: every run's pictures in one PNG, a row per model, a column per backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from anyattn.demo.extras import require
from anyattn.demo.results import BackendRun, DemoResult, ModelResult

__all__ = ["write_contact_sheet"]

PICTURE = 112
PICTURES = 2
GAP = 10
CAPTION = 34
LABEL = 170
HEADER = 56
CELL = PICTURES * PICTURE + 4
INK, PALE, RED, PAPER = (25, 25, 30), (120, 120, 130), (190, 30, 30), (250, 250, 248)


def write_contact_sheet(result: DemoResult, path: str | Path) -> Path:
    """Write the pictures of all runs as one PNG.

    Each cell holds up to two pictures: both prompts of a batch, or the first and last frame of a video. Below
    them stand the run's largest difference from the truth and what is allowed of it.

    Args:
        result: What `run_demo` gave.
        path: The file to write; folders that don't exist are made.

    Returns:
        The path.

    Raises:
        MissingExtraError: If Pillow isn't installed.
    """
    image_module, draw_module, font_module = (require(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    columns = ("float64", *dict.fromkeys(run.backend for model in result.models for run in model.runs))
    width = LABEL + len(columns) * (CELL + GAP) + GAP
    height = HEADER + len(result.models) * (PICTURE + CAPTION + GAP) + GAP
    sheet = image_module.new("RGB", (width, height), PAPER)
    pen = _Pen(sheet, draw_module.Draw(sheet), image_module, font_module)
    pen.write((GAP, 8), f"anyattn demo: {result.device}, {result.dtype}, {result.steps} steps, seed {result.seed}")
    for index, name in enumerate(columns):
        pen.write((LABEL + index * (CELL + GAP), 32), name, bold=True)
    for index, model in enumerate(result.models):
        _draw_model(pen, model, columns, HEADER + index * (PICTURE + CAPTION + GAP))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, format="PNG")
    return target


class _Pen:
    """Draws on one sheet."""

    def __init__(self, sheet: Any, draw: Any, images: Any, fonts: Any) -> None:
        self.sheet = sheet
        self.draw = draw
        self.images = images
        self.small, self.large = fonts.load_default(11), fonts.load_default(14)

    def write(self, at: tuple[int, int], text: str, *, color: tuple[int, int, int] = INK, bold: bool = False) -> None:
        self.draw.text(at, text, fill=color, font=self.large if bold else self.small)

    def paste(self, at: tuple[int, int], picture: Tensor) -> None:
        """Draw one picture `(3, height, width)` in [0, 1], enlarged without smoothing."""
        _, height, width = picture.shape
        # A NaN has no colour; black shows it, and the caption says what happened.
        bytes_ = (picture.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flatten()
        tile = self.images.frombytes("RGB", (width, height), bytes(bytes_.tolist()))
        self.sheet.paste(tile.resize((PICTURE, PICTURE), self.images.Resampling.NEAREST), at)

    def box(self, at: tuple[int, int], text: str, color: tuple[int, int, int]) -> None:
        left, top = at
        self.draw.rectangle((left, top, left + CELL - 4, top + PICTURE - 1), outline=color)
        self.write((left + 8, top + PICTURE // 2 - 8), text, color=color)


def _draw_model(pen: _Pen, model: ModelResult, columns: tuple[str, ...], top: int) -> None:
    pen.write((GAP, top + 4), model.title, bold=True)
    pen.write((GAP, top + 26), f"{model.calls} attention calls", color=PALE)
    pen.write((GAP, top + 42), f"allowed: {model.budget.image:.1e}", color=PALE)
    runs = {run.backend: run for run in model.runs}
    for index, name in enumerate(columns):
        at = (LABEL + index * (CELL + GAP), top)
        if index == 0:
            _draw_pictures(pen, at, model.image)
            pen.write((at[0], top + PICTURE + 3), f"the truth, {model.truth_seconds:.2f} s", color=PALE)
        elif name in runs:
            _draw_run(pen, at, runs[name])


def _draw_run(pen: _Pen, at: tuple[int, int], run: BackendRun) -> None:
    color = RED if run.status == "failed" else PALE
    below = (at[0], at[1] + PICTURE + 3)
    if run.image is None or run.errors is None:
        pen.box(at, run.status, color)
        pen.write(below, _shorten(run.reason), color=color)
        return
    _draw_pictures(pen, at, run.image)
    pen.write(below, f"{run.status}: off by {run.errors.image:.1e}, {run.seconds:.2f} s", color=color)
    pen.write((below[0], below[1] + 14), _shorten(run.reason), color=color)


def _draw_pictures(pen: _Pen, at: tuple[int, int], pictures: Tensor) -> None:
    chosen = pictures[[0, -1]] if len(pictures) > 1 else pictures
    for index, picture in enumerate(chosen):
        pen.paste((at[0] + index * (PICTURE + 2), at[1]), picture)


def _shorten(text: str, limit: int = 42) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
