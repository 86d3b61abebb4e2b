"""A rehearsal of a job for GPUs that cannot run here, under the rules of GPUs.

Complete, with its resume.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.jobs import read_rows
from support.tiny_models import make_tiny_model

from rlhf3d.data.parquet import read_parquet

JOB = """
model: {path: nowhere/Big-Model, dtype: bfloat16, use_remove_padding: true, offload: true}
data:
  train_files: [nowhere/train.parquet]
  val_files: [nowhere/test.parquet]
  train_batch_size: 512
actor:
  layout: {tp: 4, pp: 2, dp: 8, sequence_parallel: true, recompute: full}
  ppo_mini_batch_size: 128
critic:
  layout: {tp: 1, pp: 1, dp: 8}
rollout: {engines: 64, sleep: true, gpu_memory_utilization: 0.4}
algorithm: {use_kl_in_reward: true}
reward: {weights: {accuracy: 1.0, reward_model: 0.5}}
reward_model: {path: nowhere/Judge, layout: {tp: 2, dp: 4}}
cluster: {platform: cuda, num_nodes: 8}
"""


@pytest.mark.timeout(600)
def test_a_job_of_64_gpus_is_rehearsed_on_a_few_processes(tmp_path: Path) -> None:
    make_tiny_model(
        tmp_path / "models" / "Big-Model", "qwen2", heads=8, kv_heads=4, hidden=512, layers=8
    )
    (tmp_path / "models" / "Big-Model" / "model.safetensors").unlink()
    make_tiny_model(
        tmp_path / "models" / "Judge", "llama", heads=8, kv_heads=2, hidden=256, layers=6
    )
    (tmp_path / "job.yaml").write_text(JOB)
    command = [
        str(Path(sys.executable).with_name("rlhf3d")),
        "rehearse",
        "job.yaml",
        "--max-ranks",
        "4",
        "--as-gpu",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "two steps, saved, resumed and repeated exactly" in done.stdout
    for note in (
        "otherwise  actor.layout: TP4×PP2×DP8 -> TP2×PP1×DP1 (at most 4 training ranks)",
        "otherwise  critic.layout: TP1×PP1×DP8 -> TP1×PP1×DP1 (at most 4 training ranks)",
        "otherwise  reward_model.layout: TP2×PP1×DP4 -> TP1×PP1×DP1 (at most 4 training ranks)",
        "otherwise  rollout.engines: 64 -> 2 (at most 2 vLLM processes)",
        "otherwise  cluster.platform: cuda -> as_gpu (without GPUs)",
        "otherwise  nowhere/train.parquet: not here; generated word problems stand in",
    ):
        assert note in done.stdout
    folder = tmp_path / "rehearsals" / "job"
    assert read_parquet(folder / "train" / "train_0.parquet")[0].data_source == "rlhf3d/arithmetic"
    assert all(
        -1 < row["reward_model/score/mean"] < 1 for row in read_rows(folder / "run") if row["step"]
    )
    assert (folder / "resumed" / "checkpoints" / "step_2" / "manifest.json").is_file()
