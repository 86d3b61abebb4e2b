"""vLLM and Megatron agree within rounding, in a run and in a configuration that is tried out; where
the engine samples in another way, that is named.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.jobs import train, write_job
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.evaluation import mismatch_config
from rlhf3d.evaluation.mismatch import examine
from rlhf3d.rollout.api import SamplingSettings
from rlhf3d.trainer import mismatch_trial
from rlhf3d.trainer.preemption import PreemptionHandler


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


@pytest.mark.full  # starts an engine and a trainer
@pytest.mark.timeout(600)
def test_a_sampling_fault_of_a_configuration_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mismatch_trial._requests

    def colder(inputs: Any, count: int, seed: int, sampling: SamplingSettings) -> Any:
        return real(inputs, count, seed, replace(sampling, temperature=0.6))

    monkeypatch.setattr(mismatch_trial, "_requests", colder)
    with PreemptionHandler.of_this_process().handling_signals():
        found = mismatch_config.try_config(
            write_job(tmp_path),
            ["data.max_response_length=12"],
            answers=24,
            float32=True,
            preemption=PreemptionHandler.of_this_process(),
        )
    agrees = {variation.kind: variation.agrees for variation in found.variations}
    assert agrees == {"configured": False, "read": True, "sampled": False, "again": False}
    assert found.finding.fault and found.finding.setting == "sampling"
    assert found.examined.diagnosis.causes[0].kind == "sampling"
    # What it wrote is read as a run's.
    assert examine(found.folder).diagnosis.verdict == "cause"
    assert not (tmp_path / "run").exists()
