"""What tests of several folders share."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

TORCH = Version(Version(torch.__version__).base_version)
"""The torch that runs, without what says how it was built."""


def needs_torch(oldest: str, what: str) -> pytest.MarkDecorator:
    """Skip a test of what this torch truly lacks, saying what.

    Args:
        oldest: The first version that has it.
        what: What is lacking before.
    """
    return pytest.mark.skipif(Version(oldest) > TORCH, reason=f"torch {oldest}: {what}")


joins_inside = needs_torch("2.9", "dynamo traces the & of two objects")
"""For masks joined with `&` in traced code."""
