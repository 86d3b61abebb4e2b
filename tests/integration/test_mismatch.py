"""A run in bfloat16 at another temperature: vLLM and Megatron agree within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.jobs import train, write_job
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.evaluation.mismatch import examine


@pytest.mark.full  # test_environments.py has a float32 run, the unit tests bfloat16 pairs
@pytest.mark.timeout(600)
def test_bfloat16_at_a_temperature_is_healthy(tmp_path: Path) -> None:
    settings = (
        "model.dtype=bfloat16",
        "rollout.dtype=bfloat16",
        "rollout.temperature=1.3",
        "data.max_response_length=16",
        "trainer.sample_tokens=64",
        "trainer.total_training_steps=2",
    )
    finished = train(write_job(tmp_path), *settings)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    found = examine(tmp_path / "run")
    assert found.diagnosis.verdict == "healthy", found.diagnosis
    # Rounding is there, and its limit is far from it.
    assert 1e-4 < found.summary.all.abs_mean < 0.03 and found.summary.all.tokens > 1500
    done = CliRunner().invoke(cli.app, ["doctor", "mismatch", str(tmp_path / "run")])
    assert done.exit_code == 0 and "Within rounding of bfloat16" in done.output
