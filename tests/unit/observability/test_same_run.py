"""Two runs' folders, compared: what counts, what does not, and how a difference is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.same_run import first_difference, is_time
from rlhf3d.observability.samples import Sample
from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens

SAMPLE = Sample("2+2", "4", "4", 1.0, "scored", 2, "stop", 3)
TOKENS = TrajectoryTokens(
    0, 0, "s", 1.0, "scored", "stop", [[TokenSpan("sampled", [7, 8, 9], ["a", "b", "c"])]]
)


def write(
    folder: Path,
    metrics: Mapping[str, float] | None = None,
    sample: Sample = SAMPLE,
    tokens: TrajectoryTokens = TOKENS,
    steps: int = 3,
) -> Path:
    """A run; `metrics`, `sample` and `tokens` are those of its step 2."""
    with MetricsWriter(folder) as writer:
        for step in range(steps):
            row = {"actor/loss": 0.5 + step, "timing_s/step": float(len(str(folder)))}
            last = step == 2
            writer.samples(step, [SAMPLE, sample if last else SAMPLE], "greedy")
            if step:
                writer.samples(step, [SAMPLE, sample if last else SAMPLE])
                writer.tokens(step, [tokens if last else TOKENS])
            writer.write(step, row | dict(metrics or {}) if last else row)
    return folder


def test_equal_runs_are_the_same_whatever_time_they_took(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    other = {"perf/throughput": 3.0, "sync/wait_s": 1.0, "env/call_s/max": 2.0}
    again = write(tmp_path / "longer name", other)
    assert first_difference(run, again, 0, 2) is None


@pytest.mark.parametrize(
    "change, named",
    [
        ({"metrics": {"actor/loss": 2.5000001}}, "step 2: actor/loss was 2.5, now 2.5000001"),
        ({"metrics": {"actor/new": 1.0}}, "step 2: actor/new was missing, now 1.0"),
        (
            {"sample": replace(SAMPLE, response="5")},
            "step 2: step_2.jsonl sample 1, response: was '4', now '5'",
        ),
        (
            {"tokens": replace(TOKENS, rows=[[TokenSpan("sampled", [7, 6, 9], ["a", "x", "c"])]])},
            "step 2: tokens of trajectory 0, rows 0 0, token_ids 1: was 8, now 6",
        ),
    ],
)
def test_the_first_difference_is_named(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    run, again = write(tmp_path / "run"), write(tmp_path / "again", **change)  # type: ignore[arg-type]
    assert first_difference(run, again, 0, 2) == named
    assert first_difference(run, again, 0, 1) is None


def test_steps_of_which_a_kill_left_nothing_are_not_missed(tmp_path: Path) -> None:
    run, again = write(tmp_path / "run", steps=2), write(tmp_path / "again")
    assert first_difference(run, again, 0, 2) is None
    missing = first_difference(again, run, 0, 2)
    assert missing == "step 2: step_2.jsonl is missing"


def test_what_is_a_time() -> None:
    assert all(map(is_time, ("timing_s/step", "sync/send_s", "env/call_s/mean", "perf/throughput")))
    assert is_time("async/groups_running"), "what had ended by then"
    assert is_time("perf/rank_memory_gib") and is_time("perf/host_memory_gib")
    assert not any(map(is_time, ("actor/loss", "sync/sent_bytes", "rollout/engine_restarts")))
