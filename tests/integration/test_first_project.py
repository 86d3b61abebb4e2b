"""The first project of examples/, copied elsewhere and trained for two steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.jobs import MARKED, left_behind, read_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_copy_is_trained(tmp_path: Path) -> None:
    written = shutil.ignore_patterns("runs", "*.parquet")
    project = ROOT / "examples" / "first_project"
    copied = shutil.copytree(project, tmp_path / "copied", ignore=written)
    environment = MARKED | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def run(*command: str) -> None:
        arguments = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        done = subprocess.run(
            arguments, cwd=copied, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    run("python", "data.py")
    model = ROOT / "models" / "SmolLM2-135M-Instruct"
    steps = ("trainer.total_training_steps=2", "trainer.test_freq=0")
    run("rlhf3d", "train", "config.yaml", f"model.path={model}", *steps)
    rows = [row for row in read_rows(copied / "runs" / "first_project") if row["step"] > 0]
    assert len(rows) == 2
    for row in rows:
        assert row["num_turns/max"] > 1 and row["reward/outcome/scored"] == 32
        # The completions of a group differ, so that there is something to learn from.
        assert row["critic/score/max"] > row["critic/score/min"] and row["actor/grad_norm"] > 0
    assert not left_behind()
