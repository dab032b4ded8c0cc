"""The examples of the documentation run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import anyattn

ROOT = Path(__file__).parents[1]
PACKAGE = Path(anyattn.__file__).parent
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

MODULES = (
    "api",
    "settings",
    "masks.objects",
    "masks.values",
    "scopes.recording",
    "pins.steps",
    "policy.policy",
    "policy.rule",
)
"""What a user calls: these have examples. Others may have some, and they are run too."""

IN_GUIDES = ("masks.md", "policies.md", "transformers.md", "tuning.md")


def blocks(path: Path) -> list[tuple[int, str]]:
    """Give the Python blocks of a Markdown file, each with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in FENCE.finditer(text)]


def modules_with_examples() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    return found


def run(example: doctest.DocTest) -> None:
    """Run one text's examples; raises with the whole report of what differed."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(example, out=report.append, clear_globs=False)
    assert not report, "".join(report)


def with_extras(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} needs an extra of anyattn", exc_type=ModuleNotFoundError)


def test_every_public_module_has_examples() -> None:
    assert set(MODULES) <= set(modules_with_examples())


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings_give_what_they_say(name: str) -> None:
    module = importlib.import_module(f"anyattn.{name}") if name in MODULES else with_extras(f"anyattn.{name}")
    examples = [found for found in doctest.DocTestFinder().find(module) if found.examples]
    assert examples
    if name.startswith("demo."):
        for extra in ("diffusers", "transformers"):
            pytest.importorskip(extra, reason=f"the examples of anyattn.{name} need {extra}")
    for example in examples:
        run(example)


@pytest.mark.parametrize("name", IN_GUIDES)
def test_examples_of_a_guide_give_what_they_say(name: str) -> None:
    path = ROOT / "docs" / name
    found = [(line, text) for line, text in blocks(path) if ">>> " in text]
    assert found
    for extra in ("diffusers", "transformers"):
        if any(extra in text for _, text in found):
            pytest.importorskip(extra, reason=f"the guide shows the extra anyattn[{extra}]")
    shared: dict[str, Any] = {}
    for line, text in found:
        example = doctest.DocTestParser().get_doctest(text, shared, name, str(path), line)
        run(example)
        shared = example.globs


def test_every_guide_with_examples_is_run() -> None:
    with_examples = {
        path.name for path in (ROOT / "docs").glob("*.md") if any(">>> " in text for _, text in blocks(path))
    }
    assert with_examples == set(IN_GUIDES)


def test_pictures_of_the_guide_are_what_the_masks_allow() -> None:
    from anyattn.masks.objects import Causal, SlidingWindow
    from anyattn.reference.definition import allowed_positions

    shown = {"Causal": Causal, "SlidingWindow": SlidingWindow}
    text = (ROOT / "docs" / "masks.md").read_text(encoding="utf-8")
    pictures = [match[1] for match in re.finditer(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    assert len(pictures) == 2
    for picture in pictures:
        made = re.findall(r"(?:Causal|SlidingWindow)\([^)]*\)", picture)
        rows = re.findall(r"^\d +((?:[x.] ?){5}) +\d +((?:[x.] ?){5})$", picture, re.MULTILINE)
        assert len(made) == 2
        assert len(rows) == 3
        for side, source in enumerate(made):
            mask = eval(source, {"__builtins__": {}}, shown)
            drawn = torch.tensor([[cell == "x" for cell in row[side].split()] for row in rows])
            assert torch.equal(drawn, allowed_positions(mask, 1, 1, 3, 5)[0, 0]), source


def test_line_for_diffusers_in_the_readme_runs() -> None:
    with_extras("diffusers")
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        8, block_out_channels=(32,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    (_, text), *_ = [block for block in blocks(ROOT / "README.md") if "pipe" in block[1]]
    try:
        exec(text, {"anyattn": anyattn, "pipe": pipe})
        with anyattn.record() as calls:
            unet(torch.randn(1, 3, 8, 8), 1)
    finally:
        anyattn.reset_attention_backend(pipe)
    assert calls


def test_policy_of_the_readme_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    text = next(text for _, text in blocks(ROOT / "README.md") if "anyattn.Rule(" in text)
    exec(text, {"anyattn": anyattn, "pipe": model})
    assert "2 of 6 attention layers" in capsys.readouterr().out
    anyattn.reset_attention_backend(model)


def test_first_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "README.md"
    line, text = next(block for block in blocks(path) if "torch.randn" in block[1])
    shared: dict[str, Any] = {}
    exec(compile("\n" * line + text, str(path), "exec"), shared)
    assert shared["out"].shape == (2, 512, 8, 64)
    assert shared["lse"].shape == (2, 8, 512)
    assert "native" in capsys.readouterr().out


def test_hub_page_lists_the_hub_backends_with_their_pins() -> None:
    from anyattn.backend.from_hub import FromHub
    from anyattn.selection import registry

    page = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    found = {name: registry.get(name) for name in registry.BUILTIN}
    hub = {name: backend for name, backend in found.items() if isinstance(backend, FromHub)}
    assert set(listed) == set(hub) == {name for name, backend in found.items() if backend and backend.downloads}
    for name, backend in hub.items():
        kernel = backend.hub
        pinned = f"commit `{kernel.revision}`" if kernel.revision else f"version {kernel.version}"
        assert listed[name] == f"`{kernel.repo}` | {pinned}", name


def test_backends_page_is_what_the_declarations_say() -> None:
    import subprocess
    import sys

    script = Path(__file__).parents[1] / "tools" / "docs" / "backends.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, "write docs/backends.md anew with: python tools/docs/backends.py"


def test_terminal_output_is_what_the_program_prints(tmp_path: Path) -> None:
    with_extras("typer")
    import shutil
    import subprocess
    import sys

    script = shutil.copy(ROOT / "tools" / "docs" / "terminal.py", _folder(tmp_path / "tools" / "docs"))
    page = Path(shutil.copy(ROOT / "docs" / "cli.md", _folder(tmp_path / "docs")))
    check = [sys.executable, str(script), "--check"]
    done = subprocess.run(check, check=False, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"write docs/cli.md anew with: python tools/docs/terminal.py\n{done.stdout}{done.stderr}"
    )
    page.write_text(
        page.read_text(encoding="utf-8").replace("native runs this call", "flex runs this call", 1), "utf-8"
    )
    done = subprocess.run(check, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "-flex runs this call" in done.stdout


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_every_block_of_terminal_output_says_how_it_was_made() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    made = re.findall(r"^<!-- output.*? -->\n\n```text\n\$ anyattn ", text, re.MULTILINE)
    assert len(made) == text.count("```text") == text.count("<!-- output") > 3


@pytest.mark.parametrize("command", ["doctor", "explain", "verify", "demo"])
def test_synopsis_of_a_command_has_its_options(command: str) -> None:
    with_extras("typer")
    import typer

    from anyattn.cli.app import app

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    synopsis = re.search(rf"^```\nanyattn {command} (.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert synopsis is not None
    made: Any = typer.main.get_command(app)
    options = {name for param in made.commands[command].params for name in param.opts if name.startswith("--")}
    assert set(re.findall(r"--[a-z-]+", synopsis[1])) == options


def test_backend_in_the_contributing_guide_passes_the_laws() -> None:
    from anyattn.selection import registry
    from anyattn.testing import verify

    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(import torch\n.*?)```", guide, re.DOTALL)
    assert block is not None
    scope: dict[str, Any] = {}
    exec(block.group(1), scope)
    registry.register(scope["Plain"]())
    try:
        report = verify("plain", cases=15)
    finally:
        registry.unregister("plain")
    assert report.passed, report.to_dict()
