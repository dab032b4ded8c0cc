"""The terminal view of the doctor's report: short if all is well, complete if it isn't."""

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
from anyattn.types.folding import folded
from anyattn.types.reasons import Reason

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
    """Build the view: machine, variables, default, then the backends by state."""
    parts: list[RenderableType] = [Text(f"anyattn {__version__}", style="bold"), _machine(found.environment)]
    if found.variables:
        parts.append(section("Environment variables", *(_variable(row) for row in found.variables)))
    parts.append(section("Default", _default(found.default), note="for calls that name no backend"))
    usable = [row for row in found.backends if not row.reasons]
    if usable:
        tried = any(row.trials or row.ended for row in usable)
        note = "tried on tiny inputs, compared with the reference" if tried else "not tried"
        parts.append(section("Usable here", _trials(usable) if tried else _untried(usable), note=note))
    waiting = [row for row in usable if row.downloads and not row.trials]
    if waiting:
        said = (under(Text(row.name, style="bold"), row.origin) for row in waiting)
        parts.append(section("From the Hub", *said, note="downloaded and tried only if named: anyattn doctor NAME"))
    troubled = [row for row in usable if _complaints(row)]
    # The table has the package and its version.
    named = [row for row in usable if row.origin not in ("", f"{row.package} {row.found}") and not row.downloads]
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
                note="avoided automatically; links: --json",
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


def _untried(rows: Sequence[BackendReport]) -> RenderableType:
    return table(("backend", "package"), [(row.name, _package(row)) for row in rows])


def _package(row: BackendReport) -> str:
    return f"{'contract double of ' if row.double else ''}{row.package} {row.found}".strip()


def _trials(rows: Sequence[BackendReport]) -> RenderableType:
    lines: list[Sequence[RenderableType]] = []
    for row in rows:
        devices = tuple(dict.fromkeys(trial.device for trial in row.trials)) or ("",)
        for device in devices:
            tried = {trial.step: trial for trial in row.trials if trial.device == device}
            cells = [_cell(tried.get(step), row) for step in STEPS]
            lines.append((row.name, device or "not tried", *cells, _package(row)))
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
    """Show why backends can't be used, each reason once, and then what installs the packages that are missing."""
    unusable = [row for row in rows if row.state == "unusable"]
    missing = [row for row in unusable if row.install and _codes(row) & {"not_installed"}]
    # What a process wrote before it ended belongs to its own backend.
    broken = [row for row in unusable if row.output]
    quiet = [row for row in unusable if row not in broken]
    shared = folded((row.name, [one for one in row.reasons if not _installs(row, one)]) for row in quiet)
    cures = {row.name: row.cure for row in quiet if row.cure and not (row in missing and row.cure == row.install)}
    lines: list[RenderableType] = []
    for names, reasons in shared:
        # A backend's cure stands below its first reason.
        said = dict.fromkeys(cures.pop(name) for name in names if name in cures)
        if len(reasons) == 1 and not said:
            lines.append(Text.assemble(f"{', '.join(names)}: ", _needs(reasons[0])))
        else:
            lines.append(under(", ".join(names), *map(_needs, reasons), *map(_cure, said)))
    for group in grouped(broken, lambda row: (row.reasons, row.cure, row.output)):
        cure = [_cure(group[0].cure)] if group[0].cure else []
        lines.append(under(_names(group), *map(_needs, group[0].reasons), *cure, *_output(group[0])))
    parts = [section("Not usable here", *lines)] if lines else []
    if missing:
        commands = [(_names(group), group[0].install) for group in grouped(missing, lambda row: row.install)]
        parts.append(section("Not installed", facts(commands), note="backends, and what installs their kernels"))
    return parts


def _codes(row: BackendReport) -> set[str]:
    return {reason.code for reason in row.reasons}


def _installs(row: BackendReport, reason: Reason) -> bool:
    """Whether the install command says all that a reason says: that a package is missing."""
    return bool(row.install) and reason.code == "not_installed" and reason.got.startswith("no ")


def _needs(reason: Reason) -> Text:
    return Text(f"needs {reason.need}, got {reason.got}")


def _cure(text: str) -> Text:
    return Text.assemble(("cure: ", PALE), text)


def _names(group: Sequence[BackendReport]) -> str:
    return ", ".join(row.name for row in group)


def _known_bad(row: KnownBadReport) -> RenderableType:
    return Text.assemble(
        (f"{', '.join(row.backends)} on {row.device}", PALE),
        f": {row.what}; when: {row.when}",
        (f"; instead: {row.instead}", PALE),
    )
