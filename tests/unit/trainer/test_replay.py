"""What of a run is to be repeated, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.jobs import write_job

from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.resolve import load_run
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.trainer.replay import prepare


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


def run_of(job: Path, folder: Path) -> Path:
    """A run that was resumed from step 4, later from 2, and whose engines died after step 6."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(load_run(job)))
    with JournalWriter(folder) as journal:
        for begin, last in ((0, 5), (4, 7), (2, 6)):
            journal.begin(begin, {"versions": {"torch": "0.1"}, "began": "2026-01-01"})
            for step in range(begin + 1, last + 1):
                journal.trained(step, ())
        journal.restarted()
        journal.trained(7, ())
    return folder


@pytest.mark.parametrize("after, until, last", [(0, None, 2), (0, 1, 1), (2, None, 6), (2, 4, 4)])
def test_the_parts_of_a_run(
    job: Path, after: int, until: int | None, last: int, tmp_path: Path
) -> None:
    run = run_of(job, tmp_path / "run")
    made = prepare(run, after, until, None)
    assert made.script.begin == after and made.script.until == last
    trainer = made.config.trainer
    assert trainer.output_dir == str(run / "replay") and not trainer.save_at_end
    start = str(run / "checkpoints" / "step_2") if after else "never"
    assert trainer.resume_mode == start
    notes = "\n".join(made.notes)
    assert "versions torch, 0.1 to 2" in notes
    assert ("engines died after step 6" in notes) == (after == 2)
    assert ("--after 2" in notes) == (after == 0)


@pytest.mark.parametrize(
    "after, until, named",
    [
        (1, None, "--after 1: the run began, or went on, after step 0, 2, 4"),
        (0, 3, "--until 3: .* to step 2"),
        (2, 7, "--until 7: .* to step 6"),
        (4, None, "no complete step after step 4"),
    ],
)
def test_what_cannot_be_repeated(
    job: Path, after: int, until: int | None, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        prepare(run_of(job, tmp_path / "run"), after, until, None)


def test_only_an_earlier_replay_is_removed(job: Path, tmp_path: Path) -> None:
    run, output = run_of(job, tmp_path / "run"), tmp_path / "output"
    prepare(run, 0, None, output)
    (output / "left").touch()
    assert json.loads((output / "replay_of.json").read_text())["until"] == 2
    prepare(run, 0, 1, output)
    assert [path.name for path in output.iterdir()] == ["replay_of.json"]
    (output / "replay_of.json").unlink()
    (output / "mine").touch()
    with pytest.raises(ValueError, match="no replay: name another --output"):
        prepare(run, 0, None, output)
    assert (output / "mine").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml"):
        prepare(tmp_path, 0, None, None)
