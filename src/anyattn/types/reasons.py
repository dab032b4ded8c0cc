"""Why a backend refuses a call, as data from which the text is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReasonCode = Literal[
    "not_installed",
    "wrong_version",
    "broken_import",
    "setting",
    "not_named",
    "no_device",
    "device_type",
    "arch",
    "dtype",
    "head_dim",
    "head_dim_v",
    "seqlen",
    "size",
    "mask",
    "mask_dtype",
    "mask_grad",
    "layout",
    "gqa",
    "dropout",
    "softcap",
    "scale",
    "sinks",
    "lse",
    "backward",
    "deterministic",
    "compile",
    "forward_ad",
    "vmap",
    "cuda_graph",
    "memory",
    "precision",
    "known_bad",
    "fault",
    "inexact",
    "value",
]


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason for refusing a call.

    Attributes:
        code: The kind of reason; stable, for programs.
        need: What the backend needs; for `known_bad`, the condition under which the kernel is wrong.
        got: What the call or the machine has; for `known_bad`, what the kernel does.
        hint: What to do about it, if anything.
        link: Where it is documented, if anywhere.
    """

    code: ReasonCode
    need: str
    got: str
    hint: str = ""
    link: str = ""

    def __str__(self) -> str:
        if self.code == "known_bad":
            text = f"known_bad: {self.got}, given {self.need}"
        else:
            text = f"{self.code}: needs {self.need}, got {self.got}"
        return f"{text}; {self.hint}" if self.hint else text

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a dictionary of strings, for JSON."""
        return {
            "code": self.code,
            "need": self.need,
            "got": self.got,
            "hint": self.hint,
            "link": self.link,
        }


@dataclass(frozen=True, slots=True)
class Conversion:
    """An exact change to a call that lets a kernel take it.

    Attributes:
        code: What is done; stable, for programs.
        text: What is done and why, for people.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"
