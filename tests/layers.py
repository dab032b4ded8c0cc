"""Which module of a package imports which, read from its files; nothing is imported."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

SELF = "__init__"
"""The name in an order of the package's own `__init__`: what `import package` gives."""


def boxes(root: Path) -> set[str]:
    """Give the modules and folders directly inside a package, its `__init__` among them."""
    return {path.relative_to(root).parts[0].removesuffix(".py") for path in root.rglob("*.py")}


def imports(path: Path, root: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports from its own package.

    Imports inside functions count, and so do those under TYPE_CHECKING. Of `from a import b` both `a` and `a.b` are
    given where `b` is a module, and `a` alone where it is a name.
    """
    folder = (root.name, *path.relative_to(root).parent.parts)
    for node in _statements(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            inside = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if _exists(name, root)]
            names = modules if len(modules) == len(inside) else [base, *modules]
        yield from (name for name in names if name.split(".")[0] == root.name)


@functools.lru_cache(maxsize=4096)
def _statements(text: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))


def _exists(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split(".")[1:])
    return name.startswith(f"{root.name}.") and (path.is_dir() or path.with_suffix(".py").is_file())


def violations(
    root: Path, order: Sequence[str], separate: Collection[str] = (), shared: Collection[str] = ()
) -> list[str]:
    """Say which imports go upwards or sideways.

    Args:
        root: The package's folder.
        order: Its modules and folders, the lowest first: each may import those before it and itself, and no other.
        separate: Folders, `a` or `a/b`, whose own modules and folders may not import one another.
        shared: Modules of such folders, `a/b`, that the others may import.
    """
    place = {name: index for index, name in enumerate(order)}
    there = boxes(root)
    wrong = [f"{name} has no place in the order" for name in sorted(there - set(place))]
    wrong += [f"{name} is in the order and not there" for name in order if name not in there]
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        own = where.parts[0].removesuffix(".py")
        found = tuple(dict.fromkeys(imports(path, root)))
        for name in found:
            other = (name.split(".")[1:2] or [SELF])[0]
            if other != own and place.get(other, len(order)) > place.get(own, -1):
                wrong.append(f"{where} imports {name}, which is above it")
        for folder in separate:
            inside = Path(folder).parts
            if where.parts[: len(inside)] != inside or where.parts[len(inside)] == "__init__.py":
                continue
            own = where.parts[len(inside)].removesuffix(".py")
            for name in found:
                parts = tuple(name.split(".")[1:])
                beside = parts[: len(inside) + 1]
                if parts[: len(inside)] != inside or beside in (inside, (*inside, own)) or "/".join(beside) in shared:
                    continue
                wrong.append(f"{where} imports {name}, which stands beside it")
    return wrong


def circles(root: Path) -> list[list[str]]:
    """Return each set of files that import one another, as sorted lists of modules.

    A package's `__init__` counts as the package; importing a module of it doesn't count as importing the package.
    """
    files = {".".join((root.name, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    modules = {name.removesuffix(f".{SELF}"): path for name, path in files.items()}
    reached = {name: {to for to in imports(path, root) if to in modules} - {name} for name, path in modules.items()}
    grew = True
    while grew:
        grew = False
        for name, known in reached.items():
            more = known.union(*(reached[to] for to in known))
            grew, reached[name] = grew or more != known, more
    found = {tuple(sorted({name} | {to for to in known if name in reached[to]})) for name, known in reached.items()}
    return [list(group) for group in sorted(found) if len(group) > 1]
