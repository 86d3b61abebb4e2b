"""A resumed run's rows: each step once, in the folder that it goes on in; and what may go wrong after its last step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf3d.checkpoints.manifest import Manifest
from rlhf3d.checkpoints.resume import Checkpoint
from rlhf3d.data.loader import Prompt
from rlhf3d.observability.console import Console
from rlhf3d.observability.metrics import MetricsWriter, read_metrics
from rlhf3d.observability.samples import SAMPLES_DIR
from rlhf3d.trainer import run as run_module
from rlhf3d.trainer.run import CANARY_PROMPTS, _metrics, _say_finished, _show_results, canary_tokens


def checkpoint(run: Path, step: int) -> Checkpoint:
    manifest = Manifest(step, step, ("actor",), True)
    return Checkpoint(
        run / "checkpoints" / f"step_{step}", manifest, {"metrics": {"loss": 0.5}}, {}
    )


def steps_after(run: Path, output: Path) -> list[int]:
    with _metrics(output, checkpoint(run, 3)) as writer:
        writer.write(4, {"loss": 0.4})
    return [row["step"] for row in read_metrics(output)]


def test_prompts_of_one_token_still_have_something_to_compare() -> None:
    prompts = [Prompt(ids, "t", "", {}, 0, "q") for ids in ((7,), (1, 2, 3), *[(4, 5)] * 9)]
    assert canary_tokens(prompts) == [(7, 7), (1, 2, 3), (4, 5), (4, 5)] and CANARY_PROMPTS == 4


def test_rows_after_the_checkpoint_go(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0})
    assert steps_after(tmp_path, tmp_path) == [1, 2, 3, 4]


def test_a_run_killed_between_checkpoint_and_row_gets_it(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"loss": 1.0})
    assert steps_after(tmp_path, tmp_path) == [2, 3, 4]
    assert read_metrics(tmp_path)[1]["loss"] == 0.5


def test_another_folder_begins_with_the_next_step(tmp_path: Path) -> None:
    assert steps_after(tmp_path / "run", tmp_path / "other") == [4]


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


@pytest.mark.parametrize("broken", [None, "make_report", "before_after"])
def test_nothing_that_comes_after_the_last_step_fails_a_run(
    broken: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("int is not iterable\nmore")

    if broken is not None:
        monkeypatch.setattr(run_module, broken, fail)
    run = finished_run(tmp_path)
    with Console() as console:
        _show_results(run, console, SimpleNamespace(last="step_2"))  # type: ignore[arg-type]
    told = capsys.readouterr().out
    assert "checkpoint step_2" in told
    assert ("(TypeError: int is not iterable); the run is complete" in told) == (broken is not None)
    if broken == "make_report":
        assert f"`rlhf3d report {run}` makes it" in told


def test_the_same_command_makes_the_report_of_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path)
    assert _say_finished(run) == 0 and (run / "report.md").is_file()
    assert "so nothing was done; trainer.resume_mode=never runs it again" in capsys.readouterr().out
