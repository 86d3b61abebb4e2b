"""Means and changes of a metric over steps, each with its standard error.

Invariant: steps without a finite number are left out, never counted as 0. Pure: rows only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rlhf3d.observability.metrics import Rows


def number(row: Mapping[str, Any], name: str) -> float | None:
    """The value of a metric; None where it is missing or no finite number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def training_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of training steps: row 0 is the validation before them."""
    return [row for row in rows if row["step"] > 0]


def values(rows: Rows, name: str) -> list[float]:
    """The finite values of a metric, in order."""
    found = (number(row, name) for row in rows)
    return [value for value in found if value is not None]


def mean_of(rows: Rows, name: str) -> float | None:
    """The mean of the finite values; None without any."""
    found = values(rows, name)
    return fmean(found) if found else None


def window(count: int) -> int:
    """Of so many steps those that a mean is over: a tenth, at least 5 and at most 50."""
    return min(50, max(5, count // 10))


def recent(rows: Rows) -> Rows:
    """The last rows: how the run is now."""
    return rows[-window(len(rows)) :]


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g}"


def mean_with_error(found: Sequence[float]) -> Mean:
    """Of at least one value; the error of a single one is not known (infinite)."""
    mean = fmean(found)
    if len(found) < 2:
        return Mean(mean, math.inf)
    squares = math.fsum((value - mean) ** 2 for value in found)
    return Mean(mean, math.sqrt(squares / (len(found) - 1) / len(found)))


@dataclass(frozen=True)
class Change:
    """A metric at the start and at the end of a run, and at its best in between."""

    first: Mean
    last: Mean
    best: Mean
    """The highest running mean of as many steps."""
    best_step: int
    """The last step of those."""
    steps: int
    """In each of the means."""

    @property
    def gain(self) -> Mean:
        """End minus start."""
        return difference(self.last, self.first)

    @property
    def loss(self) -> Mean:
        """Best minus end."""
        return difference(self.best, self.last)


def change(rows: Rows, name: str) -> Change | None:
    """Compare the first steps (`window`) with the last and the best.

    None where that would compare steps with themselves.
    """
    points = [(row["step"], number(row, name)) for row in rows]
    known = [(step, value) for step, value in points if value is not None]
    width = window(len(known))
    if len(known) < 2 * width:
        return None
    found = [value for _, value in known]
    sums = np.convolve(found, np.ones(width), "valid")
    best = int(sums.argmax()) + width
    return Change(
        mean_with_error(found[:width]),
        mean_with_error(found[-width:]),
        mean_with_error(found[best - width : best]),
        known[best - 1][0],
        width,
    )


def running_means(found: Sequence[float | None], width: int) -> tuple[Any, Any]:
    """Means and standard errors, as arrays, over the `width` steps up to each; at first over fewer.

    NaN where none of those has a value; of a single one only the error is.
    """
    series = np.array([math.nan if value is None else value for value in found])
    known = np.isfinite(series)
    # Around their mean, so that squares of large values keep their digits.
    middle = series[known].mean() if known.any() else 0.0
    centered = np.where(known, series - middle, 0.0)
    count, total, squares = (_sums(part, width) for part in (known, centered, centered**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / count
        variance = np.maximum(squares - total * mean, 0.0) / (count - 1)
        error = np.where(count > 1, np.sqrt(variance / count), math.nan)
    return mean + middle, error


def _sums(series: Any, width: int) -> Any:
    """Of the `width` values up to each, or of as many as there are."""
    totals = np.concatenate([[0.0], np.cumsum(series, dtype=float)])
    ends = np.arange(1, len(series) + 1)
    return totals[ends] - totals[np.maximum(ends - width, 0)]


def difference(minuend: Mean, subtrahend: Mean) -> Mean:
    """Of independent measurements, whose errors add up as squares."""
    error = math.hypot(minuend.error, subtrahend.error)
    return Mean(minuend.value - subtrahend.value, error)
