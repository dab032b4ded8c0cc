"""Run every model of the demo through every backend and compare with float64."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import anyattn
from anyattn.demo.extras import require
from anyattn.demo.models import DemoPipeline, Output, build_pipeline, check_choice
from anyattn.demo.plain import PlainArithmetic
from anyattn.demo.recipes import MODELS, TITLES, ModelName
from anyattn.demo.results import BackendRun, DemoResult, Errors, ModelResult, allow, measure
from anyattn.errors import AnyattnError, InvalidCallError, UnsupportedCallError
from anyattn.selection.registry import known, resolve_name
from anyattn.types.names import AUTO

__all__ = ["Progress", "run_demo", "usable_backends"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What the demo is about to do.

    Attributes:
        model: The model's title.
        run: `"truth"`, `"plain"` or a backend's name; empty at the end.
        done: Runs finished so far.
        total: Runs in all.
    """

    model: str
    run: str
    done: int
    total: int


def usable_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Name the exact backends that can run on a device of this machine, in the library's order.

    Args:
        device: The device of the tensors.
    """
    kind = torch.device(device).type
    rows = [row.name for row in anyattn.backends() if row.usable and row.exact]
    return tuple(name for name, backend in known(rows) if kind in backend.declarations)


def run_demo(
    models: Sequence[ModelName] = MODELS,
    backends: Sequence[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> DemoResult:
    """Run each model in float64, in plain arithmetic of `dtype`, and once per backend.

    Args:
        models: Which models; all of them by default.
        backends: Which backends, by name or alias; None is every exact one that can run on `device`.
        device: The device of every run, including the float64 truth.
        dtype: float32, bfloat16 or float16: what the judged runs compute in.
        steps: Denoising steps, at least 1.
        seed: Of weights and inputs.
        progress: Called before each run, and once at the end.

    Raises:
        InvalidCallError: If a model, device, dtype or number of steps isn't one that the demo has, or `backends` is
            empty or names `"auto"`.
        UnknownBackendError: If a backend has no such name.
        MissingExtraError: If the packages of `anyattn[demo]` aren't installed.

    Example:
        >>> run_demo(["flux"], ["native"], steps=1).ok
        True
    """
    where = torch.device(device)
    _check(models, steps, where, dtype)
    names = usable_backends(where) if backends is None else tuple(dict.fromkeys(map(resolve_name, backends)))
    if not names or AUTO in names:
        raise InvalidCallError(f"backends must name one backend or more, each by itself; got {backends}.")
    require("transformers")
    require("diffusers")
    exact = {row.name: row.exact for row in anyattn.backends()}
    job = _Job(where, dtype, steps, seed, names, exact, _Ticker(progress, len(models), len(names)))
    with _steady_cudnn():
        results = tuple(_run_model(name, job) for name in models)
    job.ticker.finish()
    return DemoResult(str(device), str(dtype).removeprefix("torch."), steps, seed, results)


def _check(models: Sequence[ModelName], steps: int, device: torch.device, dtype: torch.dtype) -> None:
    if not models:
        raise InvalidCallError(f"models must be some of {', '.join(MODELS)}; none was given.")
    for name in models:
        check_choice(name, steps)
    if device.type == "mps":
        raise InvalidCallError("The demo's truth needs a device with float64, which mps has not; use cpu.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InvalidCallError(f"dtype must be float32, bfloat16 or float16; {dtype} was given.")


class _Ticker:
    """Counts runs, and calls the caller's function for each."""

    def __init__(self, progress: Callable[[Progress], None] | None, models: int, backends: int) -> None:
        self.progress = progress
        self.total = models * (backends + 2)
        self.begun = 0

    def begin(self, model: str, run: str) -> None:
        if self.progress is not None:
            self.progress(Progress(model, run, self.begun, self.total))
        self.begun += 1

    def finish(self) -> None:
        if self.progress is not None:
            self.progress(Progress("", "", self.begun, self.total))


@dataclass(frozen=True)
class _Job:
    device: torch.device
    dtype: torch.dtype
    steps: int
    seed: int
    backends: tuple[str, ...]
    exact: dict[str, bool]
    ticker: _Ticker

    def build(self, name: ModelName, *, widen: bool = False) -> DemoPipeline:
        return build_pipeline(name, device=self.device, dtype=self.dtype, widen=widen, steps=self.steps, seed=self.seed)


def _run_model(name: ModelName, job: _Job) -> ModelResult:
    title = TITLES[name]
    job.ticker.begin(title, "truth")
    built = job.build(name, widen=True)
    with _stock_diffusers(), PlainArithmetic(keep_float64=True) as exact:
        truth, truth_seconds = _timed(built, job.device)
    job.ticker.begin(title, "plain")
    built = job.build(name)
    with _stock_diffusers(), PlainArithmetic(keep_float64=False):
        plain = built.run()
    budget = allow(plain, truth, job.dtype)
    runs = []
    for backend in job.backends:
        job.ticker.begin(title, backend)
        runs.append(_run_backend(job.build(name), backend, job, truth, budget, exact.calls))
    return ModelResult(
        name=name,
        title=title,
        calls=exact.calls,
        image=truth.image.cpu(),
        truth_seconds=truth_seconds,
        plain=measure(plain, truth),
        budget=budget,
        runs=tuple(runs),
    )


def _run_backend(
    built: DemoPipeline, backend: str, job: _Job, truth: Output, budget: Errors, expected: int
) -> BackendRun:
    exact = job.exact[backend]
    try:
        anyattn.set_attention_backend(built.pipeline, backend)
        try:
            with anyattn.record() as calls:
                output, seconds = _timed(built, job.device)
        finally:
            anyattn.reset_attention_backend(built.pipeline)
    except UnsupportedCallError as error:
        return BackendRun(backend, exact, "refused", reason=_why(error, backend))
    except AnyattnError as error:
        return BackendRun(backend, exact, "failed", reason=f"{type(error).__name__}: {error}")
    errors = measure(output, truth)
    ours = [call for call in calls if call.chosen == backend]
    reason = _complaint(errors, budget, len(ours), expected)
    kernels = Counter(call.kernel for call in ours)
    return BackendRun(
        backend=backend,
        exact=exact,
        status="measured" if not exact else "failed" if reason else "passed",
        reason=reason,
        calls=len(ours),
        kernels=tuple(sorted(kernels.items())),
        seconds=seconds,
        errors=errors,
        image=output.image.float().cpu(),
    )


def _complaint(errors: Errors, budget: Errors, calls: int, expected: int) -> str:
    """Say what is wrong with a run; empty if nothing is."""
    if calls != expected:
        return f"{calls} of the model's {expected} attention calls were made by this backend"
    if not errors.within(budget):
        return (
            f"latents off by {errors.latents:.1e} (allowed {budget.latents:.1e}), "
            f"image by {errors.image:.1e} (allowed {budget.image:.1e})"
        )
    return ""


def _why(error: UnsupportedCallError, backend: str) -> str:
    reasons = "; ".join(map(str, error.decision.reasons(backend)))
    return f"{error.decision.spec}: {reasons}"


def _timed(built: DemoPipeline, device: torch.device) -> tuple[Output, float]:
    start = time.perf_counter()
    output = built.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return output, time.perf_counter() - start


@contextmanager
def _stock_diffusers() -> Iterator[None]:
    # Diffusers' own dispatcher may have been pointed elsewhere by its environment variable; plain arithmetic
    # needs it to end in SDPA.
    dispatch: Any = require("diffusers.models.attention_dispatch")
    with dispatch.attention_backend("native"):
        yield


@contextmanager
def _steady_cudnn() -> Iterator[None]:
    # cuDNN convolutions use TF32 by default, which would make float32's budget a thousand times too wide, and
    # algorithms that change from run to run.
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield
