"""What the views are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_T = TypeVar("_T")

GOOD, BAD, PALE = "green", "bold red", "dim"


def section(title: str, *parts: RenderableType, note: str = "") -> RenderableType:
    """Put a title over indented parts, with a blank line before it."""
    head = Text(title, style="bold")
    if note:
        head.append(f"  {note}", style=PALE)
    return Group("", head, Padding(Group(*parts), (0, 0, 0, 2)))


def facts(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    """Lay out names with what belongs to them; long values wrap beside their names."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=PALE, max_width=24)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[RenderableType]],
    *,
    right: Sequence[int] = (),
    wraps: Sequence[int] = (),
    first: int | None = None,
) -> Table:
    """Lay out a table without lines.

    Args:
        headings: One per column.
        rows: The cells.
        right: The columns whose cells stand at the right.
        wraps: The columns that wrap; without any it is the last.
        first: The most columns of the terminal for the first column, which then wraps too.
    """
    wrapping = tuple(wraps) or (len(headings) - 1,)
    made = Table(box=None, padding=(0, 2, 0, 0), header_style=PALE, pad_edge=False)
    for index, heading in enumerate(headings):
        narrow = first if index == 0 else None
        made.add_column(
            heading,
            no_wrap=index not in wrapping and narrow is None,
            max_width=narrow,
            overflow="fold",
            justify="right" if index in right else "left",
        )
    for row in rows:
        made.add_row(*row)
    return made


def under(head: RenderableType, *lines: RenderableType) -> RenderableType:
    """Put lines below a head, indented."""
    return Group(head, Padding(Group(*lines), (0, 0, 0, 4))) if lines else head


def grouped(rows: Iterable[_T], key: Callable[[_T], object]) -> list[list[_T]]:
    """Put rows of one key together, in the order of each key's first row."""
    groups: dict[object, list[_T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
