"""A tiny job for the whole command, run as a user would.

Invariant: every process of a run inherits `MARK`, so that a test can tell its own from those of others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from support.tiny_models import make_tiny_model

from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow

STEPS = 30
MARK = "RLHF3D_TEST_RUN"
MARKED = {**os.environ, MARK: str(os.getpid())}
REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The share of lower-case letters among the characters."""
    return sum(c.islower() for c in solution_str) / max(len(solution_str), 1)
'''


def write_job(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny PPO job: model, prompts, reward function and configuration."""
    make_tiny_model(
        folder / "model",
        family,
        tie=family == "llama",
        layers=4,
        hidden=64,
        heads=2,
        kv_heads=2,
        ffn=128,
    )
    rows = [
        PromptRow(
            "tiny",
            [{"role": "user", "content": f"word {i}"}],
            "letters",
            {"ground_truth": "", "style": "rule"},
        )
        for i in range(64)
    ]
    write_parquet(rows, folder / "prompts.parquet", {})
    (folder / "reward.py").write_text(REWARD)
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train_files": [str(folder / "prompts.parquet")],
            "val_files": [str(folder / "prompts.parquet")],
            "val_max_samples": 16,
            "train_batch_size": 64,
            "max_prompt_length": 48,
            "max_response_length": 4,
        },
        "actor": {
            "optim": {"lr": 3.0e-3, "weight_decay": 0.0},
            "ppo_mini_batch_size": 32,
            "ppo_micro_batch_size_per_gpu": 32,
        },
        "critic": {"optim": {"lr": 3.0e-3, "weight_decay": 0.0}},
        "rollout": {"dtype": "float32", "kv_cache_gib": 0.1, "threads": 1, "n": 1},
        "algorithm": {"use_kl_in_reward": True},
        "custom_reward_function": {"path": str(folder / "reward.py")},
        "trainer": {
            "total_training_steps": STEPS,
            "output_dir": str(folder / "run"),
            "test_freq": 0,
        },
        "cluster": {"platform": "cpu"},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(job: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    command = [str(Path(sys.executable).with_name("rlhf3d")), "train", str(job), *overrides]
    return subprocess.run(
        command, env=MARKED, capture_output=True, text=True, timeout=600, check=False
    )


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
