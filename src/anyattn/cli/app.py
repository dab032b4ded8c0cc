"""The commands and their options: each makes a report, prints it, and ends with its exit code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from anyattn import __version__
from anyattn.cli import options as opt
from anyattn.cli import render
from anyattn.cli.reports import Progress, Report
from anyattn.cli.words import CallWords
from anyattn.errors import AnyattnError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See what attention runs on this machine, why, and whether it is right.",
    epilog="Exit codes: 0 is yes, 1 is no, 2 is wrong usage or a call that is wrong for any backend.",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        render.line(f"anyattn {__version__}")
        raise typer.Exit


@app.callback()
def _anyattn(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Hold what comes before a command's name."""


def _answer(make: Callable[[Progress], Report], show: Callable[[Any], Any], as_json: bool) -> NoReturn:
    """Make a report, print it, and end with its exit code."""
    try:
        with render.busy(as_json) as progress:
            report = make(progress)
    except AnyattnError as error:
        render.failure(error, as_json)
        raise typer.Exit(2) from None
    render.report(report, show, as_json)
    raise typer.Exit(report.exit_code)


@app.command(epilog="Exit codes: 0 if the default backend works here, 1 if not, 2 for wrong usage.")
def doctor(
    backends: opt.Tried = None, no_try: opt.NoTry = False, timeout: opt.Timeout = 120, as_json: opt.Json = False
) -> None:
    """Show what works here, what doesn't, why, and how to fix it.

    Every usable backend is tried on tiny inputs (a plain call, one with padding, one with gradients) and compared with
    the reference, each in a process of its own: one that crashes or hangs is a line of the report.
    """
    from anyattn.cli.commands.doctor import command
    from anyattn.cli.views.doctor import show

    def make(progress: Progress) -> Report:
        return command.doctor(backends or (), try_kernels=not no_try, timeout=timeout, progress=progress)

    _answer(make, show, as_json)


@app.command(epilog="Exit codes: 0 if a requested backend admits the call, 1 if none does, 2 for wrong usage.")
def explain(
    context: typer.Context,
    shape: opt.Shape,
    kv: opt.Kv = None,
    kv_heads: opt.KvHeads = None,
    head_dim_v: opt.HeadDimV = None,
    dtype: opt.Dtype = "bfloat16",
    masks: opt.Masks = None,
    prepared: opt.Prepared = False,
    scale: opt.Scale = None,
    softcap: opt.Softcap = None,
    sinks: opt.Sinks = False,
    lse: opt.Lse = False,
    grad: opt.Grad = False,
    mask_grad: opt.MaskGrad = False,
    dropout: opt.Dropout = 0.0,
    compiled: opt.Compiled = False,
    deterministic: opt.Deterministic = False,
    backend: opt.Preferred = None,
    preset: opt.Supposed = None,
    device: opt.DeviceType = None,
    packages: opt.Packages = None,
    torch: opt.Torch = None,
    as_json: opt.Json = False,
) -> None:
    """Show what would run for a call, and why nothing else would.

    No kernel is run and no tensor is made. Every reason of every backend that refuses the call is shown.

    Example: anyattn explain --shape 2,4096,24,128 --kv 77 --mask padding --as h100
    """
    from anyattn.cli.commands import explain as command
    from anyattn.cli.views.explain import show

    # The parameters that describe the call are named as the fields of CallWords are.
    given = {field.name: context.params[field.name] for field in dataclasses.fields(CallWords)}
    words = CallWords(**{**given, "masks": tuple(masks or ())})

    def make(progress: Progress) -> Report:
        return command.explain(
            words, backend=backend, preset=preset, device=device, packages=packages or (), torch_version=torch
        )

    _answer(make, show, as_json)


@app.command(epilog="Exit codes: 0 if every backend kept the laws, 1 if one broke or had none, 2 for wrong usage.")
def verify(
    backends: opt.Verified = None,
    device: opt.OnType = None,
    cases: opt.Cases = 60,
    laws: opt.Laws = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Run the laws of a backend on this machine.

    Cases are drawn from each backend's declaration, adversarial ones among them. A backend that can't run here is a
    failure if it is named, and is left out if none is.
    """
    from anyattn.cli.commands import verify as command
    from anyattn.cli.views.verify import show

    def make(progress: Progress) -> Report:
        return command.verify(
            backends or (),
            device=device,
            cases=cases,
            laws=laws or (),
            seed=seed,
            progress=progress,
        )

    _answer(make, show, as_json)


@app.command(
    epilog="Exit codes: 0 if no exact backend broke or left the error budget, 1 if one did, 2 for wrong usage."
)
def demo(
    out: opt.Out = Path("anyattn_demo"),
    models: opt.Models = None,
    backends: opt.Backends = None,
    device: opt.Device = None,
    dtype: opt.DemoDtype = "float32",
    steps: opt.Steps = 3,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Run real Diffusers pipelines through every backend.

    The pipelines are small and have random weights; nothing is downloaded. Each is compared with the same model in
    float64. Needs the extra anyattn[demo].
    """
    from anyattn.cli.commands import demo as command
    from anyattn.cli.views.demo import show

    def make(progress: Progress) -> Report:
        return command.demo(
            out,
            models=models or (),
            backends=backends or (),
            device=device,
            dtype=dtype,
            steps=steps,
            seed=seed,
            progress=progress,
        )

    _answer(make, show, as_json)


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
    epilog="Exit codes: the script's own; 2 for wrong usage.",
)
def record(
    script: opt.Script,
    arguments: opt.ScriptArguments = None,
    out: opt.RecordOut = None,
    plot: opt.Plot = None,
    times: opt.Times = False,
) -> None:
    """Run a script, and print which kernel ran in which of its layers.

    What the script's main thread calls through anyattn is recorded, outside code that torch.compile compiled. Options
    come before the script; what follows it is the script's own.

    Example: anyattn record --times --out calls.json generate.py --steps 4
    """
    from anyattn.cli.commands import record as command

    try:
        found = command.run(script, arguments or (), out=out, plot=plot, times=times)
    except AnyattnError as error:
        render.failure(error, as_json=False)
        raise typer.Exit(2) from None
    render.line(str(found.calls))
    raise typer.Exit(found.exit_code)


@app.command(epilog="Exit codes: 0 if some call is measured, 1 if none could be, 2 for wrong usage.")
def tune(
    calls: opt.Recording = None,
    presets: opt.Presets = None,
    grid: opt.Grid = None,
    masks: opt.Masks = None,
    dtype: opt.Dtype = "bfloat16",
    grad: opt.Grad = False,
    device: opt.Device = None,
    precision: opt.TunePrecision = "exact",
    budget: opt.Budget = None,
    again: opt.Again = False,
    as_json: opt.Json = False,
) -> None:
    """Measure which backend is fastest for some calls.

    Each call is run by every backend that auto may take for it, and what that changes is printed, with the reason. A
    backend whose result leaves the error budget is never taken. Times are kept for later programs; what was measured
    before is left out, so an interrupted command goes on where it was.

    Example: anyattn tune --preset all --budget 180
    """
    from anyattn.cli.commands import tune as command
    from anyattn.cli.views.tune import show

    def make(progress: Progress) -> Report:
        return command.run(
            calls,
            names=presets or (),
            grid=grid or (),
            masks=masks or (),
            dtype=dtype,
            grad=grad,
            device=device,
            precision=command.checked_precision(precision),
            budget=budget,
            again=again,
            progress=progress,
        )

    _answer(make, show, as_json)
