"""The terminal view of an explanation."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from anyattn.cli.commands.explain import Explanation
from anyattn.cli.views.parts import BAD, GOOD, PALE, facts, section, under
from anyattn.environment import Environment
from anyattn.types.decision import Decision
from anyattn.types.folding import Shared, folded
from anyattn.types.reasons import Reason

_BASIS = {
    "required": "required: no other backend is used instead",
    "preferred": "the first requested backend that admits the call",
    "fixed order": "the first in the library's fixed order that admits the call",
    "rule by size and mask": "the first in the order for this size and mask that admits the call",
}


def show(found: Explanation) -> RenderableType:
    """Build the view: what runs, how, what else could, and every reason against the others."""
    decision = found.decision
    parts: list[RenderableType] = [_verdict(decision), _facts(found)]
    admits = [candidate.name for candidate in decision.candidates if candidate.admits]
    others = [name for name in admits if name != decision.chosen]
    if others:
        parts.append(section("Would run it" if decision.chosen is None else "Would run it too", ", ".join(others)))
    parts += _refusals(decision)
    return Group(*parts)


def _verdict(decision: Decision) -> RenderableType:
    if decision.chosen is None:
        return Text("No requested backend runs this call.", style=BAD)
    return Text.assemble((decision.chosen, GOOD), f" runs this call, through {decision.kernel}.")


def _facts(found: Explanation) -> RenderableType:
    decision = found.decision
    wish = decision.preference
    rows: list[tuple[str, RenderableType]] = [
        ("  call", str(decision.spec)),
        ("  machine", _machine(found.machine, found.supposed, decision.spec.device_type)),
        ("  requested", f"{wish} ({_source(wish.source)})"),
    ]
    if decision.chosen is not None:
        told = decision.basis if decision.timings is None else f"by time: {decision.timings.told()}"
        rows.append(("  choice", _BASIS.get(told, told)))
    if decision.timings is not None:
        rows.append(("  times", ", ".join(map(str, decision.timings.in_order()))))
    if decision.origin:
        rows.append(("  from", decision.origin))
    rows += [("  converted", str(conversion)) for conversion in decision.conversions]
    if decision.overruled:
        rows.append(("  overruled", decision.overruled))
    return facts(rows)


def _source(source: str) -> str:
    return {"backend=": "by --backend", "built-in": "the library's default"}.get(source, f"by {source}")


def _machine(machine: Environment, supposed: str, kind: str) -> str:
    device = machine.device(kind)
    parts = [f"no {kind} device" if device is None else device.name or kind]
    if device is not None and device.arch is not None:
        parts.append(f"sm{device.arch[0]}{device.arch[1]}")
    parts.append(f"torch {machine.torch}")
    parts += [f"{name} {version}" for name, version in sorted(machine.packages.items())]
    return ", ".join(parts) + (f" (supposed: {supposed})" if supposed else " (this machine)")


def _refusals(decision: Decision) -> list[RenderableType]:
    """Write every reason once, under the backends that have it; missing packages are listed together."""
    groups = folded((candidate.name, candidate.reasons) for candidate in decision.candidates)
    without_device = {name for group in groups if _has(group, "no_device") for name in group.names}
    shown: list[RenderableType] = []
    missing: list[RenderableType] = []
    for names, reasons in groups:
        others = [reason for reason in reasons if reason.code != "not_installed"]
        if others:
            shown.append(_refusal(names, others))
        packages = [reason for reason in reasons if reason.code == "not_installed"]
        if packages:
            # A package helps only if there is a device for it.
            hints = dict.fromkeys(reason.hint for reason in packages if reason.hint)
            lines = [] if without_device.issuperset(names) else [Text(f"hint: {hint}") for hint in hints]
            needs = ", ".join(_package(reason) for reason in packages)
            missing.append(under(Text.assemble(_names(names), f": {needs}"), *lines))
    parts = [section("Refuse it", *shown)] if shown else []
    if missing:
        hidden = any(_has(group, "not_installed") and without_device.issuperset(group.names) for group in groups)
        parts.append(section("Not installed", *missing, note="how to install each: anyattn doctor" if hidden else ""))
    return parts


def _package(reason: Reason) -> str:
    """Write what is needed; that there is none of it needs no words."""
    return reason.need if reason.got.startswith("no ") else f"{reason.need} (got {reason.got})"


def _has(group: Shared, code: str) -> bool:
    return any(reason.code == code for reason in group.reasons)


def _names(names: Sequence[str]) -> Text:
    return Text(", ".join(names), style="bold")


def _refusal(names: Sequence[str], reasons: Sequence[Reason]) -> RenderableType:
    """Write reasons under the backends that have them, or beside them if there is one short reason."""
    first = reasons[0]
    if len(reasons) == 1 and not first.hint and not first.link:
        return Text.assemble(_names(names), ": ", _said(first))
    return under(_names(names), *(under(_said(reason), *_help(reason)) for reason in reasons))


def _said(reason: Reason) -> Text:
    said = f"needs {reason.need}; got {reason.got}"
    if reason.code == "known_bad":  # such a reason says for which calls the kernel is wrong, and how
        said = f"{reason.got}; when: {reason.need}"
    return Text.assemble((f"{reason.code}: ", PALE), said)


def _help(reason: Reason) -> list[Text]:
    """Write what to do about a reason, and where it is documented."""
    return [Text(f"{name} {value}") for name, value in (("hint:", reason.hint), ("see:", reason.link)) if value]
