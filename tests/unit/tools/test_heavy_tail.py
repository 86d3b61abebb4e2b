"""Trajectories whose tools sleep, fail, exit and hang, in real processes and on a smaller scale."""

from __future__ import annotations

from pathlib import Path

from rlhf3d.user_code import load_file

heavy_tail = load_file(Path(__file__).parents[3] / "tools" / "bench" / "heavy_tail.py", "tool")


def test_none_is_lost_or_scored_wrongly_and_none_waits_beyond_its_deadline() -> None:
    figures = heavy_tail.measure(200, scale=0.01, concurrent=16, call_timeout_s=5.0)
    assert figures["wrong"] == []
    assert figures["outcomes"] == {"scored": 188, "env_error": 8, "env_timeout": 4}
    assert figures["longest_wait_beyond_the_deadline_s"] < 4.0
    # Two attempts at each of those that hang, side by side: one after the other takes 40 s.
    assert figures["wall_s"] < 35.0
