"""Phase seconds and the metrics file: what is written is what is read, also after a kill and a
resume.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf3d.observability.metrics import (
    METRICS_FILE,
    MetricsWriter,
    PhaseTimer,
    phase_seconds,
    read_metrics,
    validation_accuracy,
)
from rlhf3d.observability.samples import Kind, Sample, read_samples, samples_path


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
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"actor/pg_loss": torch.tensor(0.25), "count": 3})
        writer.write(1, {"actor/pg_loss": 1 / 3})
        assert read_metrics(tmp_path) == [  # on disk while the run goes on
            {"step": 0, "actor/pg_loss": 0.25, "count": 3},
            {"step": 1, "actor/pg_loss": 1 / 3},
        ]


def test_nonfinite_values_are_null_and_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"b": math.inf, "a": math.nan, "c": 1.0})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text) == {"step": 1, "b": None, "a": None, "c": 1.0, "nonfinite": ["a", "b"]}
    assert "NaN" not in text
    assert "Infinity" not in text


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"x": step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "x"')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        writer.write(4, {"x": 40})
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"x": 1})
    with pytest.raises(ValueError, match=r"trainer\.output_dir=.* already holds 1 steps"):
        MetricsWriter(tmp_path, tensorboard=False)
    assert len(read_metrics(tmp_path)) == 1


def test_steps_must_rise(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {})
        with pytest.raises(AssertionError, match="after step 2"):
            writer.write(2, {})


def test_tensorboard_has_the_same_curve_after_a_resume(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"critic/score/mean": step / 4})
    # Files are read by the second in their names, then by a counter, as text: 10 before 9.
    (written,) = (tmp_path / "tensorboard").iterdir()
    written.rename(written.with_name("events.out.tfevents.1.of-an-earlier-second"))
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"critic/score/mean": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("critic/score/mean")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 1.0),
    ]


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


class Follower:
    """A tracker that keeps what it is shown, and fails from step `until` on."""

    def __init__(self, until: int = 99) -> None:
        self.until = until
        self.calls: list[object] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))
        if step >= self.until:
            raise OSError(28, "No space left on device")

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        self.calls.append((step, kind, list(rows)))

    def close(self) -> None:
        self.calls.append("close")


def test_trackers_see_what_is_written(tmp_path: Path) -> None:
    follower, sample = Follower(), Sample("2+2?", "4", "4", 1.0, "scored", 1, "stop", 0)
    with MetricsWriter(tmp_path, tensorboard=False, trackers=[follower]) as writer:
        writer.write(1, {"loss": math.inf})
        writer.samples(1, [sample], "greedy")
    assert follower.calls == [(1, {"loss": math.inf}), (1, "greedy", [sample]), "close"]
    assert read_samples(samples_path(tmp_path, 1, "greedy")) == [sample]


def test_a_run_goes_on_without_a_tracker_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, well = Follower(until=2), Follower()
    with MetricsWriter(tmp_path, tensorboard=False, trackers=[full, well]) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(full.calls) == 2 and len(well.calls) == 4
    assert caplog.text.count("Follower is left out") == 1 and "No space left" in caplog.text
