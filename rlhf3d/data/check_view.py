"""The report of `rlhf3d data check` for the terminal.

Invariant: shows counts that `check.py` made and decides nothing.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf3d.data.check import CheckReport, FileCheck

_BAR = 40


def render(report: CheckReport) -> RenderableType:
    """All files, then the scorer's speed."""
    parts: list[RenderableType] = [part for file in report.files for part in _file(file)]
    if report.answers_per_s is not None:
        parts.append(Text(f"scored {report.answers_per_s:g} answers/s"))
    return Group(*parts)


def _file(file: FileCheck) -> list[RenderableType]:
    source = file.provenance.get("name", "another writer")
    parts: list[RenderableType] = [
        Text(
            f"{file.path}: {file.rows} rows, {file.unreadable_count} unusable, from {source}",
            style="bold",
        )
    ]
    dropped = file.provenance.get("dropped")
    for reason, count in dropped.items() if isinstance(dropped, dict) else ():
        parts.append(Text(f"  {count} rows of its source were dropped: {reason}"))
    parts += [Text(f"  unusable: {message}") for message in file.unreadable]
    if file.lengths:
        parts.append(_histogram(file))
    parts.append(_marks(file))
    for marks in file.marks.values():
        parts += [Text(f"    {line}") for line in (*marks.misses, *marks.failures)]
    parts += [Text(f"  problem: {problem}", style="red") for problem in file.problems]
    parts += [Text(f"  warning: {warning}", style="yellow") for warning in file.warnings]
    return parts


def _histogram(file: FileCheck) -> Table:
    table = Table(
        "prompt tokens up to",
        "prompts",
        "",
        title=f"longest {file.longest}",
        title_justify="left",
        box=None,
    )
    most = max(file.lengths.values())
    for bound, count in file.lengths.items():
        table.add_row(bound, str(count), "█" * round(_BAR * count / most))
    return table


def _marks(file: FileCheck) -> Table:
    table = Table(
        "data source", "rows", "truths right", "worked solutions right", "not scored", box=None
    )
    for data_source, marks in file.marks.items():
        solutions = (
            f"{marks.solutions_right} of {marks.solutions}" if marks.solutions else "none given"
        )
        right = f"{marks.truth_right} of {marks.truths}"
        table.add_row(Text(data_source), str(marks.rows), right, solutions, str(marks.failed))
    return table
