"""The plan that the terminal shows beside the memory in use, made as a run starts."""

from __future__ import annotations

from pathlib import Path

from support.jobs import write_job

from rlhf3d.planning.of_run import planned_memory


def test_it_is_made_of_a_runs_own_file(tmp_path: Path) -> None:
    planned = planned_memory(write_job(tmp_path))
    assert planned is not None and 0 < planned.rank < planned.host


def test_an_estimator_of_ones_own_has_none(tmp_path: Path) -> None:
    own = {"adv_estimator": "centered", "custom_path": str(tmp_path / "own.py")}
    assert planned_memory(write_job(tmp_path, algorithm=own)) is None
