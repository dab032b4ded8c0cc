"""The suite for authors of backends: one call, or a file for pytest.

In the tests of a package that adds a backend:

    from anyattn import testing

    def test_conformance() -> None:
        testing.run("my_backend")

Or without a test file, for backends that are installed (names separated by commas; without the variable,
every backend that can be used on the device):

    ANYATTN_TEST_BACKENDS=my_backend ANYATTN_TEST_DEVICE=cuda pytest --pyargs anyattn.testing
"""

from __future__ import annotations

from collections.abc import Sequence

from anyattn.testing.verify import VerifyReport, verify


def run(
    backend: str, *, device: str | None = None, cases: int = 100, laws: Sequence[str] | None = None, seed: int = 0
) -> VerifyReport:
    """Run the laws for one backend, and fail if one is broken or nothing could be run.

    Args:
        backend: The backend's name.
        device: As for `verify`.
        cases: The number of cases to draw, besides the adversarial ones.
        laws: The names of the laws to run; None is all.
        seed: The random seed of the drawn cases.

    Raises:
        AssertionError: With every failure and its reproduction, or with the reasons why nothing was run.
    """
    report = verify(backend, device=device, cases=cases, laws=laws, seed=seed)
    if not report.passed:
        raise AssertionError(str(report))
    return report
