"""The run as a picture: reward, accuracy, length, KL and entropy, seconds per phase, by step.

Invariant: drawn from the rows alone, whatever they lack; a panel without data says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf3d.observability.metrics import (
    Points,
    Rows,
    by_measure,
    keys_of,
    phase_seconds,
    validation_accuracy,
    validation_reward,
)


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was measured and finite."""
    points = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_curves(rows: Rows, path: Path) -> None:
    """Write the picture as PNG."""
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3)
    _lines(
        figure.add_subplot(grid[0, 0]),
        rows,
        "reward",
        {"critic/score/mean": "score", "critic/rewards/mean": "with KL"},
    )
    _held_out(figure.add_subplot(grid[0, 1]), rows)
    _lines(
        figure.add_subplot(grid[0, 2]),
        rows,
        "response length, tokens",
        {"response_length/mean": "mean"},
    )
    kl = {"actor/ppo_kl": "KL to the sampling policy", "actor/kl_loss": "KL to the reference"}
    _lines(
        figure.add_subplot(grid[1, 0]),
        rows,
        "KL and entropy, nats per token",
        kl,
        {"actor/entropy": "entropy"},
    )
    _phases(figure.add_subplot(grid[1, 1:]), rows)
    figure.savefig(path, dpi=110, format="png")


def draw_comparison(runs: Mapping[str, Rows], path: Path) -> None:
    """Write reward, held-out accuracy and response length of several runs as PNG.

    `runs` has their rows by name; the curves of all are drawn over each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = keys_of(validation_accuracy(row) for row in chain.from_iterable(runs.values()))
    figure = Figure(figsize=(4.5 * (2 + len(measures)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = iter(figure.subplots(1, 2 + len(measures), squeeze=False)[0])
    for name, title in (
        ("critic/score/mean", "reward"),
        ("response_length/mean", "response length, tokens"),
    ):
        axes = next(panels)
        for run, rows in runs.items():
            steps, values = series(rows, name)
            axes.plot(steps, values, marker=".", label=_literal(run))
        _finish(axes, title)
    for key in measures:
        axes = next(panels)
        for run, rows in runs.items():
            _plot(axes, by_measure(rows, validation_accuracy).get(key, ()), 100, run)
        _finish(axes, f"held-out accuracy, %: {' '.join(key)}")
    figure.savefig(path, dpi=90, format="png")


def _lines(
    axes: Any,
    rows: Rows,
    title: str,
    labels: Mapping[str, str],
    right: Mapping[str, str] | None = None,
) -> None:
    """Plot metrics by name; those in `right` are dashed, with their own scale on the right."""
    for name, label in labels.items():
        steps, values = series(rows, name)
        if steps:
            axes.plot(steps, values, marker=".", label=label)
    for name, label in (right or {}).items():
        steps, values = series(rows, name)
        if steps:
            other = axes.twinx()
            other.set_ylabel(label)
            other.plot(steps, values, "k--")
            # A legend lists the lines of its own axes: an empty one stands for that on the right.
            axes.plot([], [], "k--", label=f"{label} (right)")
    _finish(axes, title)


def _held_out(axes: Any, rows: Rows) -> None:
    """Accuracy; where nothing is right or wrong, the reward model's mean score."""
    found, title = by_measure(rows, validation_accuracy), "held-out accuracy, %"
    scale, judged = 100, by_measure(rows, validation_reward)
    if judged and not found:
        found, title, scale = judged, "held-out score of the reward model", 1
    for key, points in found.items():
        _plot(axes, points, scale, " ".join(key))
    _finish(axes, title)


def _plot(axes: Any, points: Points, scale: int, label: str) -> None:
    steps, values = [row["step"] for row, _ in points], [scale * value for _, value in points]
    axes.plot(steps, values, marker="o", label=_literal(label))


def _literal(name: str) -> str:
    """A name as it is: matplotlib reads text between dollars as TeX."""
    return name.replace("$", r"\$")


def _phases(axes: Any, rows: Rows) -> None:
    steps = [row["step"] for row in rows]
    seconds = [phase_seconds(row) for row in rows]
    floor = [0.0] * len(rows)
    for phase in keys_of(seconds):
        heights = [found.get(phase, 0.0) for found in seconds]
        axes.bar(steps, heights, bottom=floor, width=0.9, label=phase)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    _finish(axes, "seconds per phase", legend_outside=True)


def _finish(axes: Any, title: str, legend_outside: bool = False) -> None:
    axes.set_title(_literal(title))
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if not axes.get_legend_handles_labels()[0]:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
    elif legend_outside:
        # Bars are stacked upward: reversed, the legend is in their order.
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    else:
        axes.legend(fontsize="small")
