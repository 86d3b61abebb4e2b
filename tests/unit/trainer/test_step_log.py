"""Rows of metrics: what a step's seconds are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.experience import row

from rlhf3d.experience.scored import Experience
from rlhf3d.experience.steps import untimed
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.observability.metrics import PhaseTimer
from rlhf3d.placement.journal import JournalWriter, read_journal
from rlhf3d.trainer.step_log import StepLog


def test_the_start_of_the_run_is_in_no_row() -> None:
    now = 0.0
    rows: dict[int, dict[str, float]] = {}
    console: Any = SimpleNamespace(phase=untimed, step=lambda *args: None)
    writer: Any = SimpleNamespace(write=rows.__setitem__)
    log = StepLog(console, writer, 2, 1, TokenRecorder(None, 0), PhaseTimer(lambda: now))
    now = 100.0  # engines start
    log.begin()
    for step in (1, 2):
        with log.phase("generate"):
            now += 3.0
        now += 1.0
        log.record(step, {"perf/total_num_tokens": 8.0, "perf/response_tokens": 4.0})
    assert [row["timing_s/step"] for row in rows.values()] == [4.0, 4.0]
    assert rows[1]["timing_s/generate"] == 3.0


def test_the_journal_has_the_steps_and_what_they_trained_on(tmp_path: Path) -> None:
    nothing: Any = SimpleNamespace()
    with JournalWriter(tmp_path) as journal:
        journal.begin(0, {})
        log = StepLog(nothing, nothing, 2, 1, TokenRecorder(None, 0), journal=journal)
        log.trained(1, Experience([row(1.0), row(0.0)], ended=[4, 3]))
        log.trained(2, Experience([]))
    (segment,) = read_journal(tmp_path)
    assert segment.steps == {1: ("", ""), 2: ()} and segment.ended == {1: (4, 3), 2: ()}
