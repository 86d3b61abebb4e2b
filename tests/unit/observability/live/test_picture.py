"""The live view as text: what it shows at widths that terminals have, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from rlhf3d.observability.live.picture import FIGURES, picture, sparkline
from rlhf3d.observability.live.state import MemoryPlanned, RunState, Waited

STEP = {
    "critic/score/mean": 0.25,
    "actor/kl_loss": 0.0123,
    "training/rollout_probs_diff_mean": 0.004,
    "actor/entropy": 1.5,
    "response_length/mean": 310.0,
    "response/truncated_ratio": 0.031,
    "perf/total_num_tokens": 40_000.0,
    "timing_s/generate": 12.0,
    "timing_s/update_actor": 6.0,
    "timing_s/step": 20.0,
}
AHEAD = {
    "async/groups_complete": 3.0,
    "async/groups_running": 61.0,
    "async/overlap_share": 0.85,
    "training/off_policy/trajectory_staleness_worst/mean": 1.2,
    "training/off_policy/trajectory_staleness_worst/max": 2.0,
}
RANKS = Waited({f"actor rank {rank} (tp0 pp0 dp{rank})": None for rank in range(8)}, 0.0, 600.0)


def state_after(steps: int, row: dict[str, float]) -> RunState:
    state = RunState(total=200)
    for step in range(1, steps + 1):
        state = state.phase_begins("generate", 0.0).phase_ends(12.0)
        state = state.step_ends(row | {"critic/score/mean": step / 40}, step, 200, 0.0)
    state = state.validated({"val-core/gsm8k/acc/greedy": 0.5})
    state = state.validated({"val-core/gsm8k/acc/greedy": 0.54, "val-core/数学/acc/greedy": 0.1})
    return state.phase_begins("generate", 0.0)


@pytest.mark.parametrize("width", [20, 60, 80, 160])
def test_everything_fits(width: int) -> None:
    for waited in (None, RANKS):
        text = picture(state_after(30, STEP | AHEAD), 500.0, width, 40, waited).plain
        assert max(map(cell_len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_run_answers(width: int) -> None:
    text = picture(state_after(30, STEP | AHEAD), 9.0, width, 40).plain
    for part in (
        "step 31/200 │ ETA 56:31 │ generate 0:09 (before 0:12)",
        "reward       0.750 ▁",
        "KL to ref   0.0123 ",
        "mismatch    0.0040 ",
        "entropy      1.500 ",
        "length         310 ",
        "truncated     3.1% ",
        "tokens/s      2000 ",
        "held-out  gsm8k greedy 54.0% ▁█",
        "数学 greedy 10.0%",
        "time      generate 60% · update_actor 30% · other 10%",
        "queue     3 groups complete, 61 running",
        "staleness 1.2 (max 2)",
    ):
        assert part in text


def test_what_a_run_lacks_takes_no_place() -> None:
    row = {"critic/score/mean": 0.5, "timing_s/step": 1.0}
    text = picture(state_after(1, row), 0.0, 80, 40).plain
    assert "KL" not in text and "queue" not in text and "tokens/s" not in text
    assert picture(RunState(total=24), 5.0, 60, 40).plain.splitlines()[1:] == [
        "step 1/24 │ starting"
    ]


def test_memory_stands_beside_its_plan() -> None:
    row = {"perf/rank_memory_gib": 3.44, "perf/host_memory_gib": 9.26}
    state = state_after(1, row)
    assert "memory    fullest rank 3.4 GiB · host in use 9.3 GiB" in picture(state, 0, 80, 40).plain
    state = replace(state, planned=MemoryPlanned(3.94, 8.0))
    assert (
        "memory    fullest rank 3.4 GiB (plan 3.9) · host in use 9.3 GiB (the run's plan 8.0)"
        in picture(state, 0, 100, 40).plain
    )


def test_the_last_step_is_not_passed() -> None:
    state = RunState().step_ends(STEP, 24, 24, 0.0).phase_begins("validate", 0.0)
    assert "step 24/24 │ ETA 0:00 │ validate 0:02" in picture(state, 2.0, 60, 40).plain


def test_kl_in_the_reward_comes_before_that_in_the_loss() -> None:
    text = picture(state_after(2, STEP | {"actor/reward_kl_penalty": 0.5}), 0.0, 80, 40).plain
    assert "KL to ref   0.5000 " in text and "0.0123" not in text


@pytest.mark.parametrize(("height", "lines"), [(1, 1), (3, 2), (6, 5)])
def test_a_low_terminal_shows_the_first_lines(height: int, lines: int) -> None:
    text = picture(state_after(30, STEP), 0.0, 80, height).plain
    assert len(text.splitlines()) == lines


def test_a_slow_phase_names_who_is_waited_for() -> None:
    state = state_after(3, STEP)
    assert "waits for" not in picture(state, 20.0, 160, 40, RANKS).plain
    lines = picture(state, 60.0, 160, 40, RANKS).plain.splitlines()
    assert lines[2] == "generate takes 5.0 times its longest; deadline in 9:00"
    assert lines[3].startswith("waits for actor rank 0 (tp0 pp0 dp0), actor rank 1 ")
    assert lines[3].endswith(" and 4 more")
    narrow = picture(state, 60.0, 60, 40, RANKS).plain.splitlines()
    assert narrow[3] == "waits for actor rank 0 (tp0 pp0 dp0) and 7 more"


def test_a_first_run_is_slow_by_its_deadline() -> None:
    state = RunState(total=9).phase_begins("start", 0.0)
    one = Waited(["engine 0"], 0.0, 600.0)
    assert picture(state, 400.0, 80, 40, one).plain.splitlines()[2:] == [
        "start takes long; deadline in 3:20",
        "waits for engine 0",
    ]


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, None, math.nan, 5.0], 8) == "▁  █"
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([None], 8) == sparkline([], 8) == ""


def test_every_metric_shown_is_documented() -> None:
    documented = (Path(__file__).parents[4] / "docs" / "metrics.md").read_text(encoding="utf-8")
    shown = [name for _, names, _ in FIGURES for name in names]
    assert [name for name in shown if f"`{name}`" not in documented] == []
