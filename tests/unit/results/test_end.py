"""What may go wrong after a run's last step, and what its command shows when it comes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.observability.console import Console
from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.samples import SAMPLES_DIR
from rlhf3d.results import end
from rlhf3d.results.end import show_finished, show_results


def finished_run(folder: Path) -> Path:
    """Two steps, and answers whose ground truths are numbers, as runs once wrote them."""
    with MetricsWriter(folder) as writer:
        for step in (1, 2):
            writer.write(step, {"critic/score/mean": 0.5, "timing_s/step": 1.0})
    (folder / SAMPLES_DIR).mkdir()
    sample = {
        "prompt": "1 + 1",
        "response": "2",
        "ground_truth": 2,
        "score": 1.0,
        "outcome": "scored",
        "length": 1,
    }
    line = json.dumps({**sample, "finish_reason": "stop", "policy_version": 0})
    for step in (1, 2):
        (folder / SAMPLES_DIR / f"greedy_step_{step}.jsonl").write_text(line + "\n")
    return folder


@pytest.mark.parametrize("broken", [None, "make_report", "write_page", "before_after"])
def test_nothing_that_comes_after_the_last_step_fails_a_run(
    broken: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("int is not iterable\nmore")

    if broken is not None:
        monkeypatch.setattr(end, broken, fail)
    run = finished_run(tmp_path)
    with Console() as console:
        show_results(run, console, Path("step_2"))
    told = capsys.readouterr().out
    assert "checkpoint step_2" in told
    assert ("(TypeError: int is not iterable); the run is complete" in told) == (broken is not None)
    if broken in ("make_report", "write_page"):
        assert f"`rlhf3d report {run}` makes it" in told


def test_a_run_without_a_checkpoint_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console() as console:
        show_results(finished_run(tmp_path), console, None)
    told = capsys.readouterr().out
    assert "no checkpoint was saved" in told and "None" not in told


def test_the_same_command_makes_the_report_of_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path)
    assert show_finished(run) == 0 and (run / "report.md").is_file()
    assert (run / "report.html").is_file()
    assert "so nothing was done; trainer.resume_mode=never runs it again" in capsys.readouterr().out
