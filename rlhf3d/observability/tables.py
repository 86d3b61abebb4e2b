"""The one way a command shows what it found: tables and lines for people, JSON for programs.

Invariant: computes and decides nothing, and reads no markup in the texts that it is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf3d.terminal import Terminal

FILE_WIDTH = 200
"""Columns of tables in a file or a pipe, where no terminal limits them."""
Row = Mapping[str, object]
"""Cells by column: numbers, texts, or None for an empty cell. An empty row is a line across."""


@dataclass(frozen=True)
class View:
    """The findings of a command, in two forms."""

    parts: Sequence[str | Text | Table]
    """For people, in the order shown; lines of text are never wrapped."""
    data: Any
    """For programs: what `json.dumps` takes."""

    def show(self, as_json: bool = False, stderr: bool = False) -> None:
        """Print it."""
        if as_json:
            print(json.dumps(self.data))
            return
        terminal = Terminal(stderr=stderr, highlight=False)
        if not terminal.is_terminal and "COLUMNS" not in os.environ:
            terminal.width = FILE_WIDTH
        for part in self.parts:
            terminal.print(part, soft_wrap=not isinstance(part, Table))


def table(rows: Sequence[Row], title: str | None = None, digits: int = 1, **options: Any) -> Table:
    """Return rows of the same columns as a table.

    Fractions get `digits` decimals. Columns that hold a number are aligned to the right;
    the others may be folded where the terminal is narrow. `options` are those of rich's Table.
    """
    made = Table(title=title, title_justify="left", **options)
    columns = list(rows[0]) if rows else []
    for name in columns:
        numeric = any(isinstance(row.get(name), int | float) for row in rows)
        justify = "right" if numeric else "left"
        made.add_column(name, justify=justify, no_wrap=numeric, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        if row:
            made.add_row(*(_cell(row[name], digits) for name in columns))
        else:
            made.add_section()
    return made


def _cell(value: object, digits: int) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, float):
        return Text(f"{value:.{digits}f}")
    return Text("" if value is None else str(value))
