"""A resumed run's rows: each step once, in the folder that it continues in."""

from __future__ import annotations

from pathlib import Path

from rlhf3d.checkpoints.manifest import Manifest
from rlhf3d.checkpoints.resume import Checkpoint
from rlhf3d.config.schema import TrainerConfig
from rlhf3d.observability.metrics import MetricsWriter, read_metrics
from rlhf3d.trainer.start import open_metrics


def checkpoint(run: Path, step: int) -> Checkpoint:
    manifest = Manifest(step, step, ("actor",), True)
    return Checkpoint(
        run / "checkpoints" / f"step_{step}", manifest, {"metrics": {"loss": 0.5}}, {}
    )


def steps_after(run: Path, output: Path) -> list[int]:
    trainer = TrainerConfig(output_dir=str(output))
    with open_metrics(trainer, {}, checkpoint(run, 3), warn=print) as writer:
        writer.write(4, {"loss": 0.4})
    return [row["step"] for row in read_metrics(output)]


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
