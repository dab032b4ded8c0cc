"""A call of sizes never seen before is described, checked and decided with little Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import anyattn

MOST_CALLS = 350


def _benchmark() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "misses.py"
    spec = importlib.util.spec_from_file_location("misses", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"backend": "auto"}, {"backend": ["native", "flex"]}])
def test_miss_enters_few_python_functions(options: dict[str, Any]) -> None:
    misses = _benchmark()
    inputs = list(misses.inputs(20))
    for query, key, value in inputs[1:]:
        anyattn.attention(query, key, value, **options)
    calls = misses.python_calls(lambda: anyattn.attention(*inputs[0], **options))
    assert 50 < calls <= MOST_CALLS
    assert misses.python_calls(lambda: anyattn.attention(*inputs[0], **options)) < 10
