"""Does every algorithm learn, and is it the same in another layout?

A tiny model and task, by the complete command each time.

    python tools/bench/algorithms.py learning [--algorithms ppo grpo ...] [--seeds 0 1 2]
    python tools/bench/algorithms.py invariance [--algorithms ppo gspo ...] [--steps 3]

The task: answer with lower-case letters (reward: their share of four characters). A model of 0.1 M
random weights starts near 0.23. `learning` prints the mean reward of the first step and of the
last; the exit status is 1 where a run ends below 0.9. DAPO stops by itself when too few groups
still differ, when the task is solved: its last step counts. `invariance` runs one rank beside TP2 x
PP2 x DP2 with packed sequences under a token budget, and prints the largest difference of reward,
loss and gradient norm over the steps; the exit status is 1 where one is above 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

# The tiny job is the tests' own.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.jobs import read_rows, train, write_job

GROUPS = ["data.train_batch_size=16", "rollout.n=4", "actor.ppo_mini_batch_size=8"]


def _grouped(estimator: str, *overrides: str) -> list[str]:
    return [f"algorithm.adv_estimator={estimator}", *overrides, *GROUPS]


ALGORITHMS = {
    "ppo": ["algorithm.adv_estimator=gae", "algorithm.use_kl_in_reward=true"],
    "grpo": _grouped("grpo", "actor.use_kl_loss=true"),
    "dr_grpo": _grouped(
        "grpo",
        "algorithm.norm_adv_by_std_in_grpo=false",
        "actor.loss_agg_mode=seq-mean-token-sum-norm",
    ),
    "rloo": _grouped("rloo"),
    "opo": _grouped("opo"),
    "reinforce_plus_plus": [
        "algorithm.adv_estimator=reinforce_plus_plus",
        "algorithm.use_kl_in_reward=true",
    ],
    "reinforce_plus_plus_baseline": _grouped(
        "reinforce_plus_plus_baseline", "actor.policy_loss=pg"
    ),
    "remax": ["algorithm.adv_estimator=remax"],
    "gspo": _grouped("grpo", "actor.policy_loss=gspo", "actor.loss_agg_mode=seq-mean-token-mean"),
    "cispo": _grouped("grpo", "actor.policy_loss=cispo"),
    "dapo": _grouped(
        "grpo",
        "actor.clip_ratio_high=0.28",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=10",
    ),
}
QUICK = [
    # Nothing but training: validations and saves would only take time.
    *("trainer.val_before_train=false", "trainer.save_at_end=false", "data.val_max_samples=1"),
    "algorithm.use_kl_in_reward=false",
]
LEARNING = ["ppo", "grpo", "rloo", "reinforce_plus_plus", "dapo"]
LAYOUTS = {
    "one rank": [],
    "TP2 x PP2 x DP2, packed, token budget": [
        *(f"actor.layout.{axis}=2" for axis in ("tp", "pp", "dp")),
        *(
            "model.use_remove_padding=true",
            "actor.use_dynamic_bsz=true",
            "actor.ppo_max_token_len_per_gpu=256",
        ),
    ],
}
COMPARED = [
    "critic/score/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "critic/vf_loss",
    "critic/grad_norm",
]


def run(
    job: Path, algorithm: str, seed: int, steps: int, overrides: list[str]
) -> list[dict[str, float]]:
    """Metrics of every step."""
    output = Path(tempfile.mkdtemp(dir=job.parent))
    chosen = [
        *QUICK,
        *ALGORITHMS[algorithm],
        *overrides,
        f"trainer.seed={seed}",
        f"trainer.output_dir={output}",
    ]
    done = train(job, *chosen, f"trainer.total_training_steps={steps}")
    # Without groups that differ there is no step: for DAPO the task is solved, and the run ends.
    solved = algorithm == "dapo" and "groups" in done.stderr
    if done.returncode and not solved:
        sys.exit(f"{algorithm}, seed {seed} failed:\n{done.stderr[-3000:]}")
    return [row for row in read_rows(output) if "critic/score/mean" in row]


def learning(job: Path, algorithms: list[str], seeds: list[int], steps: int = 16) -> bool:
    """Whether every algorithm ends above 0.9 with every seed."""
    table = Table("algorithm", "seed", "first", "last", "steps", "s")
    worst = 1.0
    for algorithm in algorithms:
        for seed in seeds:
            start = time.monotonic()
            rewards = [row["critic/score/mean"] for row in run(job, algorithm, seed, steps, [])]
            seconds, done = f"{time.monotonic() - start:.0f}", str(len(rewards))
            table.add_row(
                algorithm, str(seed), f"{rewards[0]:.3f}", f"{rewards[-1]:.3f}", done, seconds
            )
            print(
                f"{algorithm} seed {seed}: {rewards[0]:.3f} -> {rewards[-1]:.3f} in {done} steps",
                file=sys.stderr,
            )
            worst = min(worst, rewards[-1])
    Console(width=120).print(table)
    return worst >= 0.9


def invariance(job: Path, algorithms: list[str], seeds: list[int], steps: int = 3) -> bool:
    """Whether every algorithm's first steps are the same in both layouts."""
    table = Table("algorithm", *COMPARED)
    worst = 0.0
    for algorithm in algorithms:
        one, other = (
            run(job, algorithm, seeds[0], steps, overrides) for overrides in LAYOUTS.values()
        )
        largest = {}
        for name in [name for name in COMPARED if name in one[0]]:
            pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True)]
            # A loss may be next to nothing: relative to 1 at least there.
            scale = [1.0 if name.endswith("loss") else abs(a) for a, _ in pairs]
            largest[name] = max(abs(a - b) / by for (a, b), by in zip(pairs, scale, strict=True))
        table.add_row(
            algorithm, *(f"{largest[name]:.1e}" if name in largest else "" for name in COMPARED)
        )
        print(algorithm, largest, file=sys.stderr)
        worst = max(worst, *largest.values())
    Console(width=120).print(table)
    return worst <= 1e-4


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["learning", "invariance"])
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    of_learning = options.what == "learning"
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder))
        algorithms = options.algorithms or (LEARNING if of_learning else list(ALGORITHMS))
        measure = learning if of_learning else invariance
        steps = {} if options.steps is None else {"steps": options.steps}
        sys.exit(int(not measure(job, algorithms, options.seeds, **steps)))


if __name__ == "__main__":
    main()
