"""Tables as data: columns with hints, cells with their exact value behind the rounded one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column; `hint` says what its numbers are, `text` that it holds words."""

    name: str
    hint: str = ""
    text: bool = False


@dataclass(frozen=True)
class Cell:
    """What is shown, and the exact value where that is rounded."""

    text: str
    exact: str = ""


@dataclass(frozen=True)
class Row:
    """The cells of a row; `marked` sets a row off from the others, such as the base."""

    cells: tuple[Cell, ...]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A captioned table; every row has a cell per column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def row(cells: Iterable[Cell | str], *, marked: bool = False) -> Row:
    """A row of cells; a plain text is a cell without an exact value."""
    return Row(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells), marked)


def facts_table(caption: str, facts: Sequence[tuple[str, Any]]) -> Table:
    """Two columns: what, and its value as text."""
    columns = (Column("", text=True), Column("", text=True))
    return Table(caption, columns, tuple(row((name, as_text(value))) for name, value in facts))


def as_text(value: Any) -> str:
    """A value of a config or protocol as a reader writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple) and all(
        isinstance(item, str | int | float) for item in value
    ):
        return ", ".join(as_text(item) for item in value)
    if isinstance(value, dict) and all(
        isinstance(item, str | int | float) for item in value.values()
    ):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
