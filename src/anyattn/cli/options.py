"""The options of the commands, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyattn.cli.words import DEVICE_TYPES, MASK_WORDS
from anyattn.environment import PRESET_NAMES

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

# A call in words.
Shape = Annotated[str, typer.Option(metavar="B,S,H,D", help="The query's shape.")]
Kv = Annotated[int | None, typer.Option(help="Length of key and value. [S]")]
KvHeads = Annotated[int | None, typer.Option(help="Heads of key and value; fewer is GQA. [H]")]
HeadDimV = Annotated[int | None, typer.Option(help="head_dim of value. [D]")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, float64, or bf16, ...")]
Masks = Annotated[
    list[str] | None, typer.Option("--mask", metavar="MASK", help=f"{', '.join(MASK_WORDS)}. Several are joined.")
]
Prepared = Annotated[bool, typer.Option("--prepared", help="Every row has a key, as prepare_mask records it.")]
Scale = Annotated[float | None, typer.Option(help="Factor of the scores. [1/sqrt(D)]")]
Softcap = Annotated[float | None, typer.Option(help="cap * tanh(score / cap).")]
Sinks = Annotated[bool, typer.Option("--sinks", help="Extra logits in the softmax's denominator.")]
Lse = Annotated[bool, typer.Option("--lse", help="Return the log-sum-exp too.")]
Grad = Annotated[bool, typer.Option("--grad", help="Query, key and value need gradients.")]
MaskGrad = Annotated[bool, typer.Option("--mask-grad", help="The additive mask needs a gradient.")]
Dropout = Annotated[float, typer.Option(help="Probability with which a weight is dropped.")]
Compiled = Annotated[bool, typer.Option("--compile", help="The call is inside torch.compile.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Deterministic algorithms are required.")]

# Who decides, on which machine.
Preferred = Annotated[
    str | None, typer.Option(metavar="NAME[,NAME]...", help="One is required, several are preferred in order.")
]
Supposed = Annotated[
    str | None, typer.Option("--as", metavar="DEVICE", help=f"Suppose a machine: {', '.join(PRESET_NAMES)}.")
]
DeviceType = Annotated[
    str | None, typer.Option(help=f"{', '.join(DEVICE_TYPES)}. [the machine's accelerator, else cpu]")
]
Packages = Annotated[
    list[str] | None, typer.Option("--with", metavar="NAME=VERSION", help="Suppose a package installed.")
]
Torch = Annotated[str | None, typer.Option(metavar="VERSION", help="Suppose a version of torch.")]

# What runs, on which device.
Tried = Annotated[
    list[str] | None, typer.Argument(metavar="[BACKEND]...", help="Try only these. [all that are usable]")
]
NoTry = Annotated[bool, typer.Option("--no-try", help="Try no kernel; report only what is known without.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds that one step of a trial may take.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [cuda if there is one]")]
Verified = Annotated[list[str] | None, typer.Argument(metavar="[BACKEND]...", help="Verify only these. [all]")]
OnType = Annotated[str | None, typer.Option(help="cpu, cuda, ... [cuda if there is one]")]
Cases = Annotated[int, typer.Option(min=0, help="How many cases to draw, besides the adversarial ones.")]
Laws = Annotated[list[str] | None, typer.Option("--law", help="Run this law; may be repeated. [all]")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the contact sheet goes.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Run this model; may be repeated. [all]")]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="Through this backend; may be repeated. [all exact]")
]
DemoDtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]

# What is measured.
Recording = Annotated[
    Path | None, typer.Argument(metavar="[CALLS.json]", help="A recording: anyattn record --out CALLS.json SCRIPT")
]
Presets = Annotated[
    list[str] | None, typer.Option("--preset", metavar="NAME", help="A published model's call, or all; repeatable.")
]
Grid = Annotated[
    list[str] | None, typer.Option("--grid", metavar="B,S,H,D", help="A shape; 1:2,1024:4096,24,128 is four of them.")
]
TunePrecision = Annotated[str, typer.Option("--precision", help="exact, int8, fp8 or fp4: which kernels take part.")]
Budget = Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Begin no further call after this.")]
Again = Annotated[bool, typer.Option("--again", help="Measure also what was measured before.")]

# What is recorded.
Script = Annotated[Path, typer.Argument(metavar="SCRIPT", help="The Python file to run.")]
ScriptArguments = Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="The script's arguments.")]
RecordOut = Annotated[Path | None, typer.Option("--out", help="A file that gets the rows as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="A picture of them, .png or .svg; needs anyattn[plots].")]
Times = Annotated[bool, typer.Option("--times", help="Time each call.")]
