"""An evaluation's results for the terminal.

Invariant: shows figures that `records.results` made and computes none.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text


def render(report: dict[str, Any]) -> RenderableType:
    """A table for each mode: data sources, and their levels and types."""
    used = report["prompts"]
    lines: list[RenderableType] = [
        Text(
            f"{report['model']}: {used['used']} prompts, {used['dropped']} dropped, {used['truncated']} truncated"
        )
    ]
    for mode in ("greedy", "sampled"):
        if mode in report:
            lines += _mode(mode, report[mode])
    return Group(*lines)


def _mode(mode: str, figures: dict[str, Any]) -> list[RenderableType]:
    groups = figures["by"]
    names = [
        name for name in next(iter(groups.values())) if name not in ("ci_low", "ci_high", "prompts")
    ]
    table = Table(
        Column(mode, overflow="fold"), "prompts", *names[:1], "95 %", *names[1:], box=None
    )
    for group, values in groups.items():
        cells = [f"{100 * values[name]:.1f}" for name in names]
        interval = f"{100 * values['ci_low']:.1f} to {100 * values['ci_high']:.1f}"
        table.add_row(group, f"{values['prompts']:.0f}", *cells[:1], interval, *cells[1:])
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in figures["outcomes"].items())
    note = (
        f"{figures['completions']} completions of {figures['mean_length']:.0f} tokens on average: {outcomes}; "
        f"{figures['truncated']} cut off at the limit. Figures in %."
    )
    return [table, Text(note)]
