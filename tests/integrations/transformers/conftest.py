"""The integration is enabled for each test, and everything is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers", reason="the integration needs the extra anyattn[transformers]")


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    from anyattn.integrations import transformers as integration

    integration.enable()
    yield
    integration.disable()
