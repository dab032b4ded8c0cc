"""The terminal view of the laws: a line for each backend, a column for each law, and every failure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from anyattn.cli.commands.verify import Verification
from anyattn.cli.views.parts import BAD, GOOD, PALE, facts, grouped, section, table, under
from anyattn.testing.verify import BackendReport, LawReport

_SHOWN = 2


def show(found: Verification) -> RenderableType:
    """Build the view: the table, the laws in words, what broke them, and what couldn't be verified."""
    report = found.report
    parts: list[RenderableType] = [
        Text(f"{report.device}: {report.machine}, torch {report.torch}, seed {report.seed}", style=PALE)
    ]
    ran = [row for row in report.backends if row.laws]
    doubles = [row for row in ran if row.ran != "kernel"]
    if ran:
        kernels = [row for row in ran if row.ran == "kernel"]
        parts += ["", _table(kernels)] if kernels else []
        if doubles:
            note = "fakes of kernels: these counts test adapters, not kernels"
            parts.append(section("Contract doubles", _table(doubles), note=note))
        note = "cases passed; n/m: n of m broke it; -: no case applied"
        parts.append(section("The laws", facts(_legend(ran)), note=note))
    broken = [(row, law) for row in ran for law in row.laws if law.failures]
    if broken:
        parts.append(section("Broken"))
        parts += [line for row, law in broken for line in _failures(row, law)]
    if found.skipped():
        groups = grouped(found.skipped(), lambda row: row.unusable)
        parts.append(section("Not verified", *(_skipped(group) for group in groups)))
    verdict = ("Every backend that could run kept the laws.", GOOD)
    if doubles:
        verdict = ("Every adapter kept the laws against its contract double; its kernel was not run.", GOOD)
    if found.exit_code:
        verdict = ("A law was broken.", BAD) if broken else ("Not every backend could be verified.", BAD)
    return Group(*parts, "", Text.assemble(verdict))


def _table(rows: Sequence[BackendReport]) -> RenderableType:
    numbers = [str(law.number) for law in rows[0].laws]
    return table(("law", *numbers, ""), map(_line, rows), right=range(1, len(numbers) + 1), first=18)


def _line(row: BackendReport) -> Sequence[RenderableType]:
    style = GOOD if row.status == "passed" else BAD
    return (row.backend, *(_cell(law) for law in row.laws), Text(row.status, style=style))


def _cell(law: LawReport) -> Text:
    if not law.run:
        return Text("-", style=PALE)
    if law.failures:
        return Text(f"{len(law.failures)}/{law.run}", style=BAD)
    return Text(str(law.passed))


def _legend(rows: Sequence[BackendReport]) -> Iterable[tuple[str, RenderableType]]:
    for place, law in enumerate(rows[0].laws):
        worst = max(row.laws[place].worst for row in rows)
        error = f"; worst error {worst:.2f} of what is allowed" if worst else ""
        yield f"{law.number:2d} {law.law}", f"{law.statement}{error}"


def _failures(row: BackendReport, law: LawReport) -> Iterator[RenderableType]:
    of = "" if row.ran == "kernel" else f" ({row.ran})"
    yield Padding(Text.assemble((row.backend, "bold"), f"{of}, law {law.number} ({law.law})"), (0, 0, 0, 2))
    for failure in law.failures[:_SHOWN]:
        yield Padding(failure.what, (0, 0, 0, 6))
        # A line to copy: it stays one, whatever the terminal's width.
        yield Text(f"      {failure.reproduction}", style=PALE, no_wrap=True, overflow="ignore")
    more = len(law.failures) - _SHOWN
    if more > 0:
        yield Padding(f"and {more} more; --json has them all", (0, 0, 0, 6))


def _skipped(group: Sequence[BackendReport]) -> RenderableType:
    names = ", ".join(row.backend for row in group)
    reasons = [f"needs {reason.need}; got {reason.got}" for reason in group[0].unusable]
    return under(Text(names, style="bold"), *(reasons or ["no case was one that it admits"]))
