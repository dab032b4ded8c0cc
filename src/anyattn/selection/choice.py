"""What a decision carries: the backend that runs the call, the lowered call, and the backends known at that time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend, Plan
from anyattn.selection import registry
from anyattn.types.decision import Candidate, Decision, carried


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend chosen for a call, and how the call reaches it; it holds no tensor.

    Attributes:
        backend: The backend.
        caps: Its declaration for the call as it is run, if it has one.
        plan: The call as it is run, and its lowering.
        refused: The backends that were tried before, with their reasons.
        instead_of: The backend that would run the call if nothing were known of times; empty if it is the same.
    """

    backend: Backend
    caps: Capabilities | None
    plan: Plan
    refused: tuple[Candidate, ...] = ()
    instead_of: str = ""


def choice_of(decision: Decision) -> Choice:
    """Return what runs a decision.

    Raises:
        TypeError: If nothing was chosen, or the decision is a copy, which can't be run.
    """
    choice = carried(decision)
    if not isinstance(choice, Choice):
        raise TypeError(f"Nothing to run: {decision}" if decision.chosen is None else "A decision's copy can't be run.")
    return choice


class Known(Mapping[str, Backend]):
    """The backends known at one moment, each looked up when it is read."""

    def __init__(self, wanted: Sequence[str], *, third_parties: bool) -> None:
        """Store the backends that are registered or substituted now.

        Args:
            wanted: Names to include besides the library's own.
            third_parties: Whether to include all backends of other packages; they are imported when looked up.
        """
        self._wanted = tuple(wanted)
        self._third_parties = registry.third_parties() if third_parties else ()
        self._given = registry.given()

    def __getitem__(self, name: str) -> Backend:
        found = self._given.get(name)
        return registry.get(name) if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*registry.built_in_names(), *self._third_parties, *self._wanted)))

    def __len__(self) -> int:
        return len(tuple(iter(self)))
