"""Does every algorithm learn? A tiny model, one tiny task, several seeds, the whole command each time.

    python tools/bench/learning.py [--algorithms ppo grpo rloo reinforce_plus_plus dapo] [--seeds 0 1 2]

The task: answer with lower-case letters (reward: their share of four characters). A model of 0.1 M random weights
starts near 0.23. Printed is the mean reward of the first step and of the last; the exit status is 1 where a run ends
below 0.9. DAPO stops by itself when too few groups still differ, when the task is solved: its last step counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rlhf3d.data.prepare import write_parquet
from rlhf3d.data.rows import PromptRow

ROOT = Path(__file__).resolve().parents[2]
GROUPS = ["data.train_batch_size=16", "rollout.n=4", "actor.ppo_mini_batch_size=8"]
ALGORITHMS = {
    "ppo": ["algorithm.adv_estimator=gae", "algorithm.use_kl_in_reward=true"],
    "grpo": ["algorithm.adv_estimator=grpo", "actor.use_kl_loss=true", *GROUPS],
    "rloo": ["algorithm.adv_estimator=rloo", *GROUPS],
    "reinforce_plus_plus": ["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.use_kl_in_reward=true"],
    "dapo": [
        "algorithm.adv_estimator=grpo",
        "actor.clip_ratio_high=0.28",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=10",
        *GROUPS,
    ],
}
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c.islower() for c in solution_str) / max(len(solution_str), 1)
"""


def write_job(folder: Path, steps: int) -> Path:
    """Model, prompts, reward function and configuration."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_models import make_tiny_model

    make_tiny_model(folder / "model", layers=4, hidden=64, heads=2, kv_heads=2, ffn=128)
    truth = {"ground_truth": "", "style": "rule"}
    rows = [PromptRow("tiny", [{"role": "user", "content": f"word {i}"}], "letters", truth) for i in range(64)]
    write_parquet(rows, folder / "prompts.parquet", {})
    (folder / "reward.py").write_text(REWARD)
    optim = {"lr": 3.0e-3, "weight_decay": 0.0}
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train_files": [str(folder / "prompts.parquet")],
            "val_files": [str(folder / "prompts.parquet")],
            "val_max_samples": 1,
            "train_batch_size": 64,
            "max_prompt_length": 48,
            "max_response_length": 4,
        },
        "actor": {"optim": optim, "ppo_mini_batch_size": 32, "ppo_micro_batch_size_per_gpu": 32},
        "critic": {"optim": optim},
        "rollout": {"dtype": "float32", "kv_cache_gib": 0.1, "threads": 1},
        "custom_reward_function": {"path": str(folder / "reward.py")},
        "trainer": {"total_training_steps": steps, "test_freq": 0, "save_at_end": False, "val_before_train": False},
        "cluster": {"platform": "cpu"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(job: Path, algorithm: str, seed: int) -> tuple[float, float, int, float]:
    """Mean reward of the first and of the last step, number of steps, seconds."""
    output = job.parent / f"{algorithm}-{seed}"
    command = [str(Path(sys.executable).with_name("rlhf3d")), "train", str(job), *ALGORITHMS[algorithm]]
    start = time.monotonic()
    done = subprocess.run(
        [*command, f"trainer.seed={seed}", f"trainer.output_dir={output}"], capture_output=True, text=True, check=False
    )
    solved = algorithm == "dapo" and "groups" in done.stderr
    if done.returncode and not solved:
        sys.exit(f"{algorithm}, seed {seed} failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["critic/score/mean"] for row in rows if "critic/score/mean" in row]
    return rewards[0], rewards[-1], len(rewards), time.monotonic() - start


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    table = Table("algorithm", "seed", "first", "last", "steps", "s")
    worst = 1.0
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder), options.steps)
        for algorithm in options.algorithms:
            for seed in options.seeds:
                first, last, steps, seconds = run(job, algorithm, seed)
                table.add_row(algorithm, str(seed), f"{first:.3f}", f"{last:.3f}", str(steps), f"{seconds:.0f}")
                print(f"{algorithm} seed {seed}: {first:.3f} -> {last:.3f} in {steps} steps", file=sys.stderr)
                worst = min(worst, last)
    Console().print(table)
    sys.exit(int(worst < 0.9))


if __name__ == "__main__":
    main()
