"""`anyattn explain`: what would run for a call described in words, on this machine or a supposed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyattn
from anyattn.cli.words import CallWords, device_type_of, machine_of, spec_of
from anyattn.environment import Environment
from anyattn.selection import registry
from anyattn.types.decision import Decision

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """A decision, and the machine that it is for.

    Attributes:
        machine: The machine.
        supposed: The preset's name; empty if it is this machine.
        decision: What runs, and every other backend with its reasons.
    """

    machine: Environment
    supposed: str
    decision: Decision

    @property
    def exit_code(self) -> int:
        """0 if a requested backend admits the call, else 1."""
        return 0 if self.decision.chosen is not None else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "ok": self.exit_code == 0,
            "supposed": self.supposed,
            "machine": self.machine.to_dict(),
            "decision": self.decision.to_dict(),
        }


def explain(
    words: CallWords,
    *,
    backend: str | None = None,
    preset: str | None = None,
    device: str | None = None,
    packages: Sequence[str] = (),
    torch_version: str | None = None,
) -> Explanation:
    """Explain a call that is described in words; no kernel is run and no tensor is made.

    Args:
        words: The call.
        backend: A name, an alias, `"auto"`, or several with commas in order of preference; None is what the
            environment variables and the library's default say.
        preset: A machine to suppose, one of `anyattn.environment.PRESET_NAMES`; None is this one.
        device: The type of device; None is the machine's accelerator, or its CPU if it has none.
        packages: Distributions to suppose installed, each `name=version`.
        torch_version: The version of torch to suppose.

    Raises:
        UsageError: If a word has no meaning.
        InvalidCallError: If the call is wrong for any backend.
        UnknownBackendError: If a backend has no such name.
    """
    machine = machine_of(preset, packages, torch_version)
    spec = spec_of(words, device_type_of(device, machine))
    names = None if backend is None else [name.strip() for name in backend.split(",") if name.strip()]
    wish: str | list[str] | None = names[0] if names is not None and len(names) == 1 else names
    if wish == []:
        raise anyattn.UnknownBackendError(
            f"--backend {backend!r} names no backend; write a name, or several with commas."
        )
    decision = anyattn.explain(spec, backend=wish, env=machine)
    return Explanation(machine.holding(registry.distributions(), registry.modules()), preset or "", decision)
