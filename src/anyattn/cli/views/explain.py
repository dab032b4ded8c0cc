"""What people read of an explanation."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from anyattn.cli.commands.explain import Explanation
from anyattn.cli.views.parts import BAD, GOOD, PALE, facts, grouped, section, under
from anyattn.environment import Environment
from anyattn.types.decision import Candidate, Decision
from anyattn.types.reasons import Reason

_BASIS = {
    "required": "required: no other is taken in its place",
    "preferred": "the first of those asked for that admits the call",
    "fixed order": "the first of the library's order that admits the call; nothing was measured",
    "rule by size and mask": "the first that admits the call of an order by size and mask; nothing was measured here",
}


def show(found: Explanation) -> RenderableType:
    """Make what people read: what runs, how, what else could, and every reason against the others."""
    decision = found.decision
    parts: list[RenderableType] = [_verdict(decision), _facts(found)]
    admits = [candidate.name for candidate in decision.candidates if candidate.admits]
    others = [name for name in admits if name != decision.chosen]
    if others:
        parts.append(section("Would run it" if decision.chosen is None else "Would run it too", ", ".join(others)))
    refusing = [candidate for candidate in decision.candidates if not candidate.admits]
    if refusing:
        groups = grouped(refusing, lambda candidate: candidate.reasons)
        parts.append(section("Refuse it", *(_refusal(group) for group in groups)))
    return Group(*parts)


def _verdict(decision: Decision) -> RenderableType:
    if decision.chosen is None:
        return Text("Nothing that was asked for runs this call.", style=BAD)
    return Text.assemble((decision.chosen, GOOD), f" runs this call, through {decision.kernel}.")


def _facts(found: Explanation) -> RenderableType:
    decision = found.decision
    wish = decision.preference
    rows: list[tuple[str, RenderableType]] = [
        ("  call", str(decision.spec)),
        ("  machine", _machine(found.machine, found.supposed, decision.spec.device_type)),
        ("  asked for", f"{wish} ({_source(wish.source)})"),
        ("  choice", _BASIS.get(decision.basis, decision.basis)),
    ]
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


def _refusal(group: Sequence[Candidate]) -> RenderableType:
    """Show backends that share all their reasons."""
    names = ", ".join(candidate.name for candidate in group)
    return under(Text(names, style="bold"), *(_reason(reason) for reason in group[0].reasons))


def _reason(reason: Reason) -> RenderableType:
    """Make what people read of a reason: need and got, then what to do and where it is documented."""
    said = f"needs {reason.need}; got {reason.got}"
    if reason.code == "known_bad":  # such a reason says which calls the kernel is wrong for, and how
        said = f"{reason.got}, for {reason.need}"
    text = Text.assemble((f"{reason.code}: ", PALE), said)
    more = [f"{name} {value}" for name, value in (("hint:", reason.hint), ("see:", reason.link)) if value]
    return under(text, *(Text(one) for one in more))
