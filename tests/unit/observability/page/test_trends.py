"""Means with their errors, against the formulas."""

from __future__ import annotations

import math
import statistics

import pytest

from rlhf3d.observability.page.trends import change, mean_with_error, number, running_means


def test_a_mean_and_its_error() -> None:
    found = [1.0, 2.0, 4.0, 8.0]
    mean = mean_with_error(found)
    assert mean.value == 3.75
    assert mean.error == pytest.approx(statistics.stdev(found) / 2)
    assert mean_with_error([2.0]).error == math.inf


def test_running_means_end_at_each_step_and_leave_out_what_is_unknown() -> None:
    found = [1e6 + value for value in (1.0, 2.0, 4.0)] + [None] + [1e6 + 8.0, 1e6 + 16.0]
    means, errors = running_means(found, 3)
    windows = [(1,), (1, 2), (1, 2, 4), (2, 4), (4, 8), (8, 16)]
    for mean, error, window in zip(means, errors, windows, strict=True):
        assert mean - 1e6 == pytest.approx(statistics.fmean(window))
        of_several = len(window) > 1
        expected = statistics.stdev(window) / math.sqrt(len(window)) if of_several else math.nan
        assert error == pytest.approx(expected, nan_ok=True)
    nothing, _ = running_means([None, None], 3)
    assert all(math.isnan(mean) for mean in nothing)


def test_the_change_of_a_run() -> None:
    rows = [{"step": step, "x": value} for step, value in enumerate([0] * 5 + [9] * 5 + [5] * 5)]
    rows.insert(5, {"step": 99, "x": None})
    found = change(rows, "x")
    assert found is not None
    assert (found.first.value, found.best.value, found.last.value) == (0, 9, 5)
    assert (found.best_step, found.steps, found.gain.value, found.loss.value) == (9, 5, 5, 4)
    assert change(rows[:9], "x") is None


def test_what_is_a_number() -> None:
    row = {"a": 1, "b": True, "c": "1", "d": math.nan, "e": None, "f": 2.5}
    assert [number(row, name) for name in "abcdefg"] == [1.0, None, None, None, None, 2.5, None]
