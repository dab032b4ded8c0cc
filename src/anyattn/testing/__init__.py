"""The shipped conformance suite: the laws of a backend, run against any backend on any machine.

`run("my_backend")` in a test is all that a third party needs; see `anyattn.testing.suite`. `verify` returns the same as
a report, `check` runs one law for one `Case`. `strategy` draws cases with hypothesis (the extra `anyattn[testing]`).
"""

from anyattn.testing.cases.case import Case
from anyattn.testing.cases.drawing import always, strategy
from anyattn.testing.laws import LAWS, LawBroken, LawResult, check
from anyattn.testing.suite import run
from anyattn.testing.verify import VerifyReport, verify

__all__ = [
    "LAWS",
    "Case",
    "LawBroken",
    "LawResult",
    "VerifyReport",
    "always",
    "check",
    "run",
    "strategy",
    "verify",
]
