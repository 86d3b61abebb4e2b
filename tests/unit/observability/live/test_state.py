"""The state behind the live view: what events make of it, and when a phase is slow."""

from __future__ import annotations

from rlhf3d.observability.live.state import RECENT_STEPS, TREND_STEPS, RunState, Waited


def run_phase(state: RunState, name: str, began: float, ended: float) -> RunState:
    return state.phase_begins(name, began).phase_ends(ended)


def test_steps_give_the_time_left() -> None:
    state = RunState(total=10)
    assert state.left_s is None
    state = state.step_ends({"timing_s/step": 30.0}, 1, 10, 30.0)
    state = state.step_ends({"timing_s/step": 10.0}, 2, 10, 40.0)
    assert state.left_s == 8 * 20.0
    for step in range(3, 3 + RECENT_STEPS):  # the slow first one no longer counts
        state = state.step_ends({"timing_s/step": 10.0}, step, 20, 0.0)
    assert state.left_s == (20 - state.step) * 10.0


def test_an_event_changes_no_earlier_state() -> None:
    before = RunState().validated({"val-core/a/acc/greedy": 0.5})
    after = before.validated({"val-core/a/acc/greedy": 0.75})
    assert before.held_out == {("a", "greedy"): (0.5,)}
    assert after.held_out == {("a", "greedy"): (0.5, 0.75)}


def test_a_resumed_run_goes_on_with_its_trends() -> None:
    held_out = "val-core/a/acc/greedy"
    rows = [{"step": 0, held_out: 0.1}, *({"step": n, "timing_s/step": 10.0} for n in (1, 2))]
    state = RunState(step=2, total=5).resumed([*rows, {"step": 3, held_out: 0.3}], 100.0)
    assert [row["step"] for row in state.rows] == [1, 2, 3] and state.step_ended == 100.0
    assert state.held_out == {("a", "greedy"): (0.1, 0.3)} and state.left_s == 3 * 10.0
    assert RunState().resumed([], 1.0).rows == ()


def test_only_the_last_steps_are_kept() -> None:
    state = RunState()
    for step in range(TREND_STEPS + 5):
        state = state.step_ends({"critic/score/mean": step}, step, 1000, 0.0)
    assert [row["critic/score/mean"] for row in state.rows] == [*range(5, TREND_STEPS + 5)]


def test_shares_of_time_add_up() -> None:
    row = {"timing_s/step": 10.0, "timing_s/generate": 6.0, "timing_s/score": 1.0}
    state = RunState().step_ends(row, 1, 2, 0.0).step_ends(row, 2, 2, 0.0)
    assert state.shares() == {"generate": 0.6, "other": 0.3, "score": 0.1}
    assert RunState().shares() == {}


def test_a_phase_is_slow_beside_its_longest_run() -> None:
    state = run_phase(RunState(), "update_actor", 0.0, 60.0)
    state = run_phase(state, "update_actor", 60.0, 100.0).phase_begins("update_actor", 100.0)
    assert not state.is_slow(100.0 + 119.0, None)
    assert state.is_slow(100.0 + 121.0, None)
    # Another phase is measured by itself, and one that has never run by nothing.
    assert not state.phase_begins("generate", 100.0).is_slow(1000.0, None)


def test_a_short_phase_gets_some_seconds() -> None:
    state = run_phase(RunState(), "score", 0.0, 0.1).phase_begins("score", 1.0)
    assert not state.is_slow(1.0 + 15.0, None)
    assert state.is_slow(1.0 + 15.2, None)


def test_half_of_a_deadline_is_slow() -> None:
    state = RunState().phase_begins("start", 0.0)
    waited = Waited({"rank 1": None}, since=10.0, timeout_s=600.0)
    assert not state.is_slow(309.0, waited)
    assert state.is_slow(311.0, waited)
    assert not state.phase_ends(311.0).is_slow(311.0, waited)


def test_who_is_waited_for_are_those_left() -> None:
    pending = {"rank 0": None, "rank 1": None}
    waited = Waited(pending, 0.0, 1.0)
    del pending["rank 0"]
    assert waited.names == ["rank 1"]
