"""What people read of the doctor's report: short where all is well, complete where it isn't."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from anyattn import __version__
from anyattn.cli.commands.doctor.catalogue import KnownBadReport
from anyattn.cli.commands.doctor.command import BackendReport, DefaultReport, DoctorReport
from anyattn.cli.commands.doctor.trial import STEPS, Trial
from anyattn.cli.commands.doctor.variables import VariableReport
from anyattn.cli.views.parts import BAD, GOOD, PALE, facts, grouped, section, table, under
from anyattn.environment import Device, Environment

_OUTPUT = 5
_WORDS = {
    "passed": ("ok", GOOD),
    "wrong": ("WRONG", BAD),
    "raised": ("RAISED", BAD),
    "died": ("DIED", BAD),
    "hung": ("HUNG", BAD),
    "refused": ("refused", "yellow"),
}


def show(found: DoctorReport) -> RenderableType:
    """Make what people read: machine, variables, default, then the backends by how they fare."""
    parts: list[RenderableType] = [Text(f"anyattn {__version__}", style="bold"), _machine(found.environment)]
    if found.variables:
        parts.append(section("Environment variables", *(_variable(row) for row in found.variables)))
    parts.append(section("Default", _default(found.default), note="what a call gets that names no backend"))
    usable = [row for row in found.backends if not row.reasons]
    if usable:
        parts.append(section("Usable here", _trials(usable), note="tried on tiny inputs, compared with the reference"))
    waiting = [row for row in usable if row.downloads and not row.trials]
    if waiting:
        said = (under(Text(row.name, style="bold"), row.origin) for row in waiting)
        parts.append(section("From the Hub", *said, note="downloaded and tried where named: anyattn doctor NAME"))
    troubled = [row for row in usable if _complaints(row)]
    named = [row for row in usable if row.origin and not row.downloads]
    if named:
        said = (under(Text(row.name, style="bold"), row.origin) for row in named)
        parts.append(section("Whose kernels", *said, note="packages, and what their builds leave out"))
    if troubled:
        parts.append(section("What went wrong", *(under(row.name, *_complaints(row)) for row in troubled)))
    parts += _absent(found.backends)
    if found.known_bad:
        parts.append(
            section(
                "Known to be wrong on a machine like this",
                *map(_known_bad, found.known_bad),
                note="seen to by every choice; links: --json",
            )
        )
    return Group(*parts)


def _machine(machine: Environment) -> RenderableType:
    packages = ", ".join(f"{name} {version}" for name, version in sorted(machine.packages.items()))
    cudnn = "none"
    if machine.cudnn is not None:
        cudnn = f"{'.'.join(map(str, machine.cudnn))}, from {machine.cudnn_file or 'a file that is unknown'}"
    replaced = [("  replaced", f"torch's {kernel}, by {by}") for kernel, by in sorted(machine.overrides.items())]
    rows: list[tuple[str, RenderableType]] = [
        ("  python", f"{machine.python} on {machine.platform}"),
        ("  torch", str(machine.torch)),
        *(("  device", _device(device, machine.cpu)) for device in machine.devices),
        ("  cuDNN", cudnn),
        *replaced,
        ("  C++ compiler", "yes" if machine.cxx else "none: nothing can be compiled for the CPU"),
        ("  packages", packages or "none that a choice depends on"),
    ]
    return facts(rows)


def _device(device: Device, instructions: str) -> str:
    known = [device.name] if device.name else []
    if device.arch is not None:
        known.append(f"sm{device.arch[0]}{device.arch[1]}")
    if device.rocm:
        known.append("ROCm")
    if device.type == "cpu" and instructions:
        known.append(instructions)
    name = device.type if device.type == "cpu" else f"{device.type}:{device.index}"
    return f"{name} ({', '.join(known)})" if known else name


def _variable(row: VariableReport) -> RenderableType:
    style = BAD if row.state == "wrong" else "yellow" if row.nearest else ""
    text = Text.assemble((f"{row.name}={row.value}", "bold"), "  ", (row.state, style))
    lines = [row.note] if row.note else []
    if row.nearest:
        lines.append(f"nearest: {', '.join(row.nearest)}")
    return under(text, *lines)


def _default(row: DefaultReport) -> RenderableType:
    where = "the library's own" if row.source == "built-in" else f"by {row.source}"
    asked = f"{', '.join(row.names)} ({where}) on {row.device}"
    if not row.works:
        return under(Text.assemble(("doesn't work", BAD), f": {asked}"), *([row.detail] if row.detail else []))
    if not row.tried:
        return Text.assemble(("usable", GOOD), f": {asked}; not tried")
    ran = "" if (row.chosen,) == row.names else f", ran {row.chosen}"
    works = Text.assemble(("works", GOOD), f": {asked}{ran}, through {row.kernel}")
    word, style = _WORDS.get(row.compiled, ("not tried", PALE))
    detail = f"; {row.compiled_detail.splitlines()[0]}" if row.compiled_detail else ""
    return under(works, Text.assemble("in torch.compile: ", (word, style), detail))


def _trials(rows: Sequence[BackendReport]) -> RenderableType:
    lines: list[Sequence[RenderableType]] = []
    for row in rows:
        version = f"{'contract double of ' if row.double else ''}{row.package} {row.found}".strip()
        devices = tuple(dict.fromkeys(trial.device for trial in row.trials)) or ("",)
        for device in devices:
            tried = {trial.step: trial for trial in row.trials if trial.device == device}
            cells = [_cell(tried.get(step), row) for step in STEPS]
            lines.append((row.name, device or "not tried", *cells, version))
    return table(("backend", "device", *STEPS, "package"), lines)


def _cell(trial: Trial | None, row: BackendReport) -> Text:
    if trial is None:
        # Not reached by a process that died before, or not tried for a backend that declares none.
        return Text("-" if row.ended else "none" if row.trials else "", style=PALE)
    word, style = _WORDS[trial.outcome]
    return Text(word, style=style)


def _complaints(row: BackendReport) -> list[RenderableType]:
    troubled = [trial for trial in row.trials if trial.outcome != "passed"]
    # Every step of a kernel that was built for another GPU ends alike: that is said once.
    alike = grouped(troubled, lambda trial: (trial.device, trial.outcome, trial.detail))
    lines: list[RenderableType] = [
        f"{', '.join(trial.step for trial in group)} on {group[0].device}: {group[0].outcome}; {group[0].detail}"
        for group in alike
    ]
    if row.ended and not row.trials:
        lines.append(row.ended)
    lines += _output(row)
    if row.state == "fails" and row.cure:
        lines.append(Text.assemble(("cure: ", PALE), row.cure))
    return lines


def _output(row: BackendReport) -> list[RenderableType]:
    """Show the last lines that a process wrote, cut rather than wrapped."""
    return [Text(line, style=PALE, no_wrap=True, overflow="ellipsis") for line in row.output[-_OUTPUT:]]


def _absent(rows: Iterable[BackendReport]) -> list[RenderableType]:
    """Show the backends that can't be used, one entry for all that share reasons and cure."""
    parts: list[RenderableType] = []
    unusable = [row for row in rows if row.state == "unusable"]
    if unusable:
        # What is merely not installed needs no more than a line: the command that installs it.
        absent = [row for row in unusable if row.cure and {reason.code for reason in row.reasons} == {"not_installed"}]
        lines = [(_names(group), f"cure: {group[0].cure}") for group in grouped(absent, lambda row: row.cure)]
        groups = grouped((row for row in unusable if row not in absent), lambda row: (row.reasons, row.cure, row.ended))
        broken = table(
            ("backend", "why, and the cure"), [(_names(group), _unusable(group[0])) for group in groups], first=24
        )
        parts.append(section("Not usable here", facts(lines), *([broken] if groups else [])))
    return parts


def _unusable(row: BackendReport) -> RenderableType:
    # One paragraph for all reasons: two dozen backends with a line for each would be a wall.
    lines: list[RenderableType] = [Text("; ".join(f"needs {reason.need}, got {reason.got}" for reason in row.reasons))]
    if row.cure:
        lines.append(Text.assemble(("cure: ", PALE), row.cure))
    return Group(*lines, *_output(row))


def _names(group: Sequence[BackendReport]) -> str:
    return ", ".join(row.name for row in group)


def _known_bad(row: KnownBadReport) -> RenderableType:
    return Text.assemble(
        (f"{', '.join(row.backends)} on {row.device}", PALE),
        f": {row.what}, for {row.when}",
        (f"; instead: {row.instead}", PALE),
    )
