"""What a law is: a function of a backend's name and a case that passes, is refused, or raises `LawBroken`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from anyattn.backend.capabilities import Capabilities
from anyattn.environment import detect
from anyattn.errors import AnyattnError, BackendUnavailableError, UnsupportedCallError
from anyattn.selection.registry import get
from anyattn.testing.cases.case import Case, Inputs
from anyattn.testing.laws.measure import MORE_ORDERS, ORDERS, Bound
from anyattn.testing.laws.quantised import format_of, holds
from anyattn.types.reasons import Reason

Status = Literal["passed", "refused"]


@dataclass(frozen=True)
class LawResult:
    """The result of one law for one backend and case.

    Attributes:
        law: The law's name.
        backend: The backend's name.
        case: The case as it was run.
        status: `"passed"`, or `"refused"` if the backend refuses the case (or the law doesn't apply to it).
        worst: The largest error, in multiples of what is allowed; 0 if the law isn't about errors.
        reasons: Why it was refused.
    """

    law: str
    backend: str
    case: Case
    status: Status
    worst: float = 0.0
    reasons: tuple[Reason, ...] = ()


class LawBroken(AssertionError):
    """A backend breaks a law.

    Attributes:
        law: The law's name.
        backend: The backend's name.
        case: The case.
        what: What was wrong.
        worst: The error in multiples of what is allowed, or 0.
    """

    def __init__(self, law: str, backend: str, case: Case, what: str, worst: float = 0.0) -> None:
        self.law, self.backend, self.case, self.what, self.worst = law, backend, case, what, worst
        super().__init__(f"{backend} breaks the law {law!r}: {what}\n  reproduce: {self.reproduction}")

    @property
    def reproduction(self) -> str:
        """One line of Python that breaks the law again."""
        return f"from anyattn.testing import Case, check; check({self.law!r}, {self.backend!r}, {self.case!r})"


Check = Callable[[str, Case], LawResult]


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        number: Its number in the list of laws.
        name: Its name.
        statement: The law in a few words.
        check: `check(backend, case)`.
        apt: Changes any case into one that the law applies to.
        share: Which part of the cases it gets: 1 is all, 4 every fourth. Slow laws get fewer.
        wide: Whether its cases are drawn from all fields, and not only from the declaration.
    """

    number: int
    name: str
    statement: str
    check: Check
    apt: Callable[[Case, Capabilities], Case]
    share: int = 1
    wide: bool = False


def refused(law: str, backend: str, case: Case, reasons: tuple[Reason, ...]) -> LawResult:
    """Return the result for a case that the backend refuses."""
    return LawResult(law, backend, case, "refused", reasons=reasons)


def inapplicable(law: str, backend: str, case: Case, why: str) -> LawResult:
    """Return the result for a case that a law doesn't apply to."""
    return refused(law, backend, case, (Reason("value", "a case that the law is about", why),))


TOO_COARSE = "values that the kernel's number format can't hold"


def too_coarse(backend: str, inputs: Inputs) -> bool:
    """Whether a quantised backend's number format can't hold a case's values; then its results can't be judged."""
    kind = format_of(backend)
    return bool(kind) and not holds(inputs, kind)


def reasons_against(backend: str, inputs: Inputs, **changes: object) -> tuple[Reason, ...]:
    """Ask the backend itself why it refuses a call."""
    found = get(backend)
    if found is None:
        raise BackendUnavailableError(f"The backend {backend} isn't built.", backend=backend)
    spec = inputs.spec()
    return found.reasons(spec.replace(**changes) if changes else spec, detect())


def reasons_of(error: AnyattnError, backend: str) -> tuple[Reason, ...]:
    """Return the reasons that a refusal's error carries."""
    if isinstance(error, BackendUnavailableError):
        return error.reasons
    if isinstance(error, UnsupportedCallError):
        return () if error.decision is None else error.decision.reasons(backend)
    return ()


def require(law: str, backend: str, case: Case, excesses: Mapping[str, float]) -> float:
    """Check that no error is above what is allowed, and return the worst.

    Raises:
        LawBroken: If one is above what is allowed.
    """
    worst = max(excesses.values(), default=0.0)
    if not worst <= 1:
        parts = ", ".join(f"{name} {error:.3g}" for name, error in excesses.items() if not error <= 1)
        raise LawBroken(law, backend, case, f"error in multiples of what is allowed: {parts}", worst)
    return worst


def judged(law: str, backend: str, case: Case, measured: Callable[[int], Mapping[str, float]]) -> float:
    """Check as `require` does; an error slightly above the budget is measured again with more plain computations.

    Raises:
        LawBroken: If one is above what is allowed.
    """
    errors = measured(ORDERS)
    worst = max(errors.values(), default=0.0)
    if 1 < worst < 10:
        errors = measured(MORE_ORDERS)
    return require(law, backend, case, errors)


def excesses(bounds: Mapping[str, Bound], results: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the error of each result in multiples of what is allowed."""
    found = {}
    for name, result in results.items():
        found[name] = bounds[name].excess(result)
    return found


def apart(bounds: Mapping[str, Bound], ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute how far apart results are that should be equal, in multiples of what is allowed."""
    return {name: bounds[name].apart(one, others[name]) for name, one in ones.items()}
