"""A rehearsal of a job for GPUs that cannot run here, under the rules of GPUs.

Complete, with its resume. Its runs are what shows that a mixture of experts is trained on a reward
model alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.jobs import read_rows, sample_rows
from support.judge import hf_scores
from support.tiny_models import make_tiny_model

from rlhf3d.data.parquet import read_parquet, write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.rewards.score import ScoreItem

EXPERTS = """
model: {path: nowhere/Big-Model, dtype: float32, use_remove_padding: true, offload: true}
data:
  train_files: [prompts.parquet]
  val_files: [prompts.parquet, nowhere/test.parquet]
  train_batch_size: 512
actor:
  layout: {ep: 2, dp: 64}
  optim: {lr: 3.0e-3}
  ppo_mini_batch_size: 128
rollout:
  {n: 2, dtype: float32, engines: 32, tensor_parallel_size: 2, sleep: true}
algorithm: {adv_estimator: remax}
reward: {weights: {reward_model: 2.0}}
reward_model: {path: nowhere/Judge, layout: {tp: 2, dp: 4}, mean: 0.5, std: 4.0}
cluster: {platform: cuda, num_nodes: 8}
"""
PPO = """
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


def rehearse(folder: Path, job: str) -> str:
    """What the command prints."""
    (folder / "models" / "Big-Model" / "model.safetensors").unlink()
    (folder / "job.yaml").write_text(job)
    command = [str(Path(sys.executable).with_name("rlhf3d")), "rehearse", "job.yaml"]
    done = subprocess.run(
        [*command, "--max-ranks", "4", "--as-gpu"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "two steps, saved, resumed and repeated exactly" in done.stdout
    return done.stdout


@pytest.mark.timeout(1200)
def test_experts_on_64_gpus_and_their_reward_model_are_rehearsed_on_a_few_processes(
    tmp_path: Path,
) -> None:
    """Each score is exact: rows without ground truth, a greedy baseline, another architecture.

    Two training ranks share out the experts, and vLLM cuts each expert in two.
    """
    models = tmp_path / "models"
    make_tiny_model(models / "Big-Model", "qwen3_moe", heads=8, kv_heads=4, hidden=512, layers=2)
    make_tiny_model(models / "Judge", "qwen2", heads=8, kv_heads=2, hidden=256, layers=2)
    rows = [
        PromptRow("hh", [{"role": "user", "content": f"word {i}"}], "", {"style": "model"})
        for i in range(16)
    ]
    write_parquet(rows, tmp_path / "prompts.parquet", {})
    printed = rehearse(tmp_path, EXPERTS)
    for note in (
        "otherwise  actor.layout: TP1×PP1×DP64×EP2 -> TP1×PP1×DP2×EP2",
        "otherwise  reward_model.layout: TP2×PP1×DP4 -> TP1×PP1×DP1 (at most 4 training ranks)",
        "otherwise  rollout.engines: 32 -> 1 (at most 2 vLLM processes)",
        "otherwise  cluster.platform: cuda -> as_gpu (without GPUs)",
        "otherwise  nowhere/test.parquet: not here; generated word problems stand in",
    ):
        assert note in printed
    folder = tmp_path / "rehearsals" / "job"
    assert read_parquet(folder / "val" / "val_1.parquet")[0].data_source == "rlhf3d/arithmetic"
    assert (folder / "resumed" / "checkpoints" / "step_2" / "manifest.json").is_file()
    before, *steps = read_rows(folder / "run")
    assert before["sync/canary_abs_diff"] < 1e-4 and len(steps) == 2
    for step in steps:
        assert step.get("sync/canary_abs_diff", 0.0) < 1e-4
        assert step["training/rollout_logprobs_diff_max"] < 1e-3
        items, found = [], []
        for sample in sample_rows(folder / "run", step["step"]):
            asked = [{"role": "user", "content": sample["prompt"]}]
            items.append(ScoreItem("hh", sample["response"], None, messages=asked))
            found.append(sample["score"])
        expected = hf_scores(folder / "reward_model", items)
        assert float(expected.std()) > 1e-3
        assert torch.allclose(torch.tensor(found), 2.0 * (expected - 0.5) / 4.0, atol=1e-5)
        assert step["reward_model/score/mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert step["reward_model/truncated"] == 0 and step["reward/outcome/scored"] == len(items)
        assert step["reward/greedy_baseline/mean"] != step["critic/score/mean"]
    assert "val-core/hh/reward_model/greedy" in before and "val-core/hh/acc/greedy" not in before
    assert "reward model" in (folder / "run" / "report.md").read_text()


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_job_of_64_gpus_with_a_critic_is_rehearsed_on_a_few_processes(tmp_path: Path) -> None:
    models = tmp_path / "models"
    make_tiny_model(models / "Big-Model", "qwen2", heads=8, kv_heads=4, hidden=512, layers=8)
    make_tiny_model(models / "Judge", "llama", heads=8, kv_heads=2, hidden=256, layers=6)
    printed = rehearse(tmp_path, PPO)
    for note in (
        "otherwise  actor.layout: TP4×PP2×DP8 -> TP2×PP1×DP1 (at most 4 training ranks)",
        "otherwise  critic.layout: TP1×PP1×DP8 -> TP1×PP1×DP1 (at most 4 training ranks)",
        "otherwise  reward_model.layout: TP2×PP1×DP4 -> TP1×PP1×DP1 (at most 4 training ranks)",
        "otherwise  rollout.engines: 64 -> 2 (at most 2 vLLM processes)",
        "otherwise  cluster.platform: cuda -> as_gpu (without GPUs)",
        "otherwise  nowhere/train.parquet: not here; generated word problems stand in",
    ):
        assert note in printed
    folder = tmp_path / "rehearsals" / "job"
    assert read_parquet(folder / "train" / "train_0.parquet")[0].data_source == "rlhf3d/arithmetic"
    assert all(
        -1 < row["reward_model/score/mean"] < 1 for row in read_rows(folder / "run") if row["step"]
    )
    assert (folder / "resumed" / "checkpoints" / "step_2" / "manifest.json").is_file()
