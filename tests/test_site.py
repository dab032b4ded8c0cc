"""The site is built without a warning, its pictures and figures are what they say, and its code runs."""

from __future__ import annotations

import gc
import importlib.util
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import anyattn
from anyattn import errors
from anyattn.types.reasons import ReasonCode

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs the extra anyattn[docs]", exc_type=ModuleNotFoundError)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert {path.parent.name for path in site.glob("*/index.html")} >= pages
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img)[^>]+src=\"https?://|<link[^>]+rel=\"stylesheet\"[^>]+https?://", text)


def test_every_picture_of_the_site_is_there_with_words_in_its_place(site: Path) -> None:
    shown = {
        name for path in DOCS.glob("*.md") for name in re.findall(r"!\[[^\]]+\]\((pictures/[^)]+)\)", path.read_text())
    }
    assert shown == {f"pictures/{path.name}" for path in (DOCS / "pictures").glob("*.svg")}
    assert all((site / name).exists() for name in shown)
    assert "![](" not in "".join(path.read_text() for path in DOCS.glob("*.md"))


def test_pictures_of_masks_are_what_is_computed() -> None:
    drawn = _tool("pictures").drawn()
    for name, text in drawn.items():
        assert (DOCS / "pictures" / name).read_text() == text, "draw them anew: python tools/docs/pictures.py"
    cells = drawn["causal-lower-right.svg"].count('fill-opacity="1"')
    assert cells == 5 + 6 + 7 + 8 + 9 + 10


def test_figures_of_the_benchmarks_page_are_those_of_the_runs() -> None:
    for name, text in _tool("benchmarks").pages().items():
        assert (DOCS / name).read_text() == text, "write it anew: python tools/docs/benchmarks.py"


def _anchors() -> set[str]:
    return set(re.findall(r"\{#([a-z0-9-]+)\}", (DOCS / "errors.md").read_text()))


def test_every_error_and_every_reason_has_a_section() -> None:
    kinds = [vars(errors)[name] for name in errors.__all__ if name not in ("AnyattnError", "AnyattnWarning")]
    wanted = {errors.anchor_of(kind) for kind in kinds}
    wanted |= {f"reason-{code.replace('_', '-')}" for code in typing.get_args(ReasonCode)}
    assert _anchors() == wanted


def test_tracebacks_name_the_section_and_keep_notes_of_their_own() -> None:
    q = torch.randn(1, 4, 2, 8)

    class Own(errors.UnsupportedCallError):
        """A third party's."""

    for _ in range(2):
        with pytest.raises(errors.UnknownBackendError) as caught:
            anyattn.attention(q, q, q, backend="nosuch")
        caught.value.add_note("what was being done")
        place, note = caught.value.__notes__
        assert place == "See docs/errors.md#unknown-backend"
        assert note == "what was being done"
    assert Own("x").__notes__ == ["See docs/errors.md#unsupported-call"]
    assert all(one.__notes__[0].partition("#")[2] in _anchors() for one in (Own("x"), errors.KernelError("y")))


@pytest.fixture
def undone() -> Iterator[None]:
    """Leave the hosts as they were."""
    yield
    gc.collect()
    for host in ("diffusers", "transformers"):
        if host in sys.modules:
            getattr(anyattn.integrations, host).disable()
    torch._dynamo.reset()


def _run(name: str, shared: dict[str, Any]) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(DOCS / name), "exec"), shared)
    shared.clear()  # its classes' methods hold it


@pytest.mark.parametrize("name", ["arguments.md", "coming-from.md", "record.md", "sdpa.md"])
def test_code_of_a_page_runs(name: str, undone: None) -> None:
    _run(name, {})


def test_code_of_the_cookbook_runs(undone: None) -> None:
    for extra in ("diffusers", "transformers"):
        pytest.importorskip(extra, reason=f"the cookbook needs the extra anyattn[{extra}]")
    _run("cookbook.md", {})


def test_code_of_the_first_page_runs(undone: None, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("diffusers", "transformers"):
        pytest.importorskip(extra, reason=f"the page needs the extra anyattn[{extra}]")
    from transformers import LlamaConfig, LlamaForCausalLM

    from anyattn.demo.models import build_pipeline

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=None)
    made = build_pipeline("sdxl", steps=1)
    q = torch.randn(2, 6, 2, 16)
    _run(
        "index.md",
        {
            "pipe": made.pipeline,
            "prompt": {**made.arguments, "height": 64, "width": 64},
            "model": LlamaForCausalLM(config).eval(),
            "prompt_ids": torch.ones(1, 3, dtype=torch.long),
            "vision_model": torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval(),
            "images": torch.randn(1, 5, 16),
            "q": q,
            "k": q,
            "v": q,
            "keep": torch.ones(2, 6, dtype=torch.bool),
        },
    )
    assert "native" in capsys.readouterr().out
