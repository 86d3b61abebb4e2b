"""Phase seconds and the metrics file: what is written is what is read, also after a kill and a
resume.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf3d.observability.metrics import (
    METRICS_FILE,
    MetricsWriter,
    PhaseTimer,
    phase_seconds,
    read_metrics,
    validation_accuracy,
)


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_pop_starts_anew() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (2.0, 3.0):
        with timer.phase("generate"):
            clock.now += seconds
        clock.now += 0.5
    assert timer.pop() == {"timing_s/generate": 5.0, "timing_s/step": 6.0}
    assert timer.pop() == {"timing_s/step": 0.0}


def test_a_phase_that_raises_is_still_counted() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with pytest.raises(RuntimeError), timer.phase("score"):
        clock.now += 1.0
        raise RuntimeError
    with timer.phase("score"):
        clock.now += 1.0
    assert timer.pop()["timing_s/score"] == 2.0


def test_phases_do_not_nest() -> None:
    timer = PhaseTimer()
    with (
        timer.phase("generate"),
        pytest.raises(AssertionError, match="inside"),
        timer.phase("score"),
    ):
        pass


def test_rows_read_back_equal(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"actor/pg_loss": torch.tensor(0.25), "count": 3})
        writer.write(1, {"actor/pg_loss": 1 / 3})
        assert read_metrics(tmp_path) == [  # on disk while the run goes on
            {"step": 0, "actor/pg_loss": 0.25, "count": 3},
            {"step": 1, "actor/pg_loss": 1 / 3},
        ]


def test_nonfinite_values_are_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"b": math.inf, "a": math.nan, "c": 1.0})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text) == {"step": 1, "b": None, "a": None, "c": 1.0, "nonfinite": ["a", "b"]}
    assert "NaN" not in text
    assert "Infinity" not in text


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"x": step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "x"')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"x": 40})
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"x": 1})
    with pytest.raises(ValueError, match=r"trainer\.output_dir=.* already holds 1 steps"):
        MetricsWriter(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_steps_must_rise(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {})
        with pytest.raises(AssertionError, match="after step 2"):
            writer.write(2, {})


def test_reading_what_is_no_run_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_names_are_taken_apart() -> None:
    row = {
        "val-core/openai/gsm8k/acc/greedy": 0.5,
        "val-core/math/acc/mean@4": None,
        "val-aux/math/acc/std@4": 0.1,
        "timing_s/generate": 2.0,
        "timing_s/step": 9.0,
    }
    assert validation_accuracy(row) == {("openai/gsm8k", "greedy"): 0.5}
    assert phase_seconds(row) == {"generate": 2.0}
