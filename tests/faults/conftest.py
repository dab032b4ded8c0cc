"""The doctor's tests need the command line's extra."""

from __future__ import annotations

import pytest

pytest.importorskip("typer", reason="the command line needs the extra anyattn[cli]")
