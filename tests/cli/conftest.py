"""The command line needs an extra; without it these tests have nothing to test."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the command line needs the extra anyattn[cli]")
pytest.importorskip("rich", reason="the command line needs the extra anyattn[cli]")
