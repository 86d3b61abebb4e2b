"""An evaluation's results for the terminal.

Invariant: shows figures that `records.results` made and computes none.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from rlhf3d.observability.tables import Row, View, table

INTERVAL = ("ci_low", "ci_high")
"""Ends of the 95 % interval of a group's first measure."""


def results_view(report: dict[str, Any]) -> View:
    """Return a table per mode: data sources, and their levels and types."""
    used = report["prompts"]
    parts: list[str | Table] = [
        f"{report['model']}: {used['used']} prompts, {used['dropped']} dropped, "
        f"{used['truncated']} truncated"
    ]
    for mode in ("greedy", "sampled"):
        if mode in report:
            parts += _mode(mode, report[mode])
    return View(parts, report)


def _mode(mode: str, figures: dict[str, Any]) -> list[str | Table]:
    rows = [_row(mode, group, values) for group, values in figures["by"].items()]
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in figures["outcomes"].items())
    note = (
        f"{figures['completions']} completions of {figures['mean_length']:.0f} tokens on average: "
        f"{outcomes}; {figures['truncated']} cut off at the limit. Figures in %."
    )
    return [table(rows, box=None), note]


def _row(mode: str, group: str, values: dict[str, float]) -> Row:
    low, high = (100 * values[name] for name in INTERVAL)
    first, *others = (name for name in values if name not in (*INTERVAL, "prompts"))
    return {
        mode: group,
        "prompts": int(values["prompts"]),
        first: 100 * values[first],
        "95 %": f"{low:.1f} to {high:.1f}",
        **{name: 100 * values[name] for name in others},
    }
