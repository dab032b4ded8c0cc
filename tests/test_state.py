"""CONTRIBUTING lists every folder, and every object of a module that changes while a process lives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import anyattn

PACKAGE = Path(anyattn.__file__).parent
GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
CONTAINERS = {"dict", "set", "list", "deque", "count", "Bounded", "ContextVar"}
CONTAINERS |= {"WeakSet", "WeakKeyDictionary", "WeakValueDictionary"}
CACHES = {"lru_cache", "cache"}


def _called(node: ast.expr) -> str:
    """Return the name of what a call calls, without its module and its type arguments."""
    function = node.func if isinstance(node, ast.Call) else node
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def changing(source: str) -> Iterator[str]:
    """Yield the names in a module that hold something which changes."""
    tree = ast.parse(source)
    written = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and {_called(d) for d in node.decorator_list} & CACHES:
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if not isinstance(target, ast.Name) or target.id.startswith("__") or value is None:
                continue
            empty = isinstance(value, ast.Dict | ast.List) and not ast.dump(value).count("Constant")
            made = isinstance(value, ast.Call) and _called(value) in CONTAINERS
            annotated = ast.dump(node.annotation) if isinstance(node, ast.AnnAssign) else ""
            if target.id in written or made or (empty and "Mapping" not in annotated):
                yield target.id


def found() -> set[str]:
    return {
        f"{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('.__init__')}.{name}"
        for path in PACKAGE.rglob("*.py")
        for name in changing(path.read_text(encoding="utf-8"))
    }


def _table(heading: str) -> dict[str, str]:
    section = GUIDE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE))


def test_every_object_that_changes_is_listed_with_its_bound() -> None:
    listed = _table("State")
    assert set(listed) == found()
    assert all(bound.strip() for bound in listed.values())


def test_planted_state_is_found() -> None:
    planted = "import functools\nx: dict[int, int] = {}\ny = set()\n_z = None\ndef f():\n    global _z\n    _z = 1\n"
    assert set(changing(planted + "@functools.lru_cache(maxsize=2)\ndef g(): ...\nA = (1, 2)\nB = {'a': 1}\n")) == {
        "x",
        "y",
        "_z",
        "g",
    }


def sentences() -> dict[str, str]:
    """Return the first sentence of each folder's docstring."""
    found = {}
    for path in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        found[str(path.parent.relative_to(PACKAGE))] = (docstring or "").split("\n\n")[0].replace("\n", " ")
    return {folder: sentence for folder, sentence in found.items() if folder != "."}


def test_map_says_of_each_folder_what_its_docstring_says() -> None:
    assert _table("Map") == sentences()
