"""What asynchronous training gains where environments wait: seconds a step, modes side by side.

    python tools/bench/async_overlap.py                       # all modes, about 12 minutes
    python tools/bench/async_overlap.py --modes k0 k1 --rounds 1
    python tools/bench/async_overlap.py --against ../older    # also k0 of another checkout

A tiny model trains with an environment whose calls sleep (Pareto, exponent 1.1, by the trajectory's
seed), long enough that about half of a step with a staleness of 0 is waiting: two cores cannot
compute two things at once, but one can wait while the other computes. Modes take turns, each
`--rounds` times, so that what else the machine does meets all of them. The bound is, step by step
of k0's own phases, the longer one of writing the next batch and training on this one, and the sync.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.rehearsal.miniature import write_model

BEFORE = 3
"""Steps left out at the start of a run: first calls and canaries take longer."""
PROMPTS, N = 8, 2
MODES: dict[str, tuple[str, ...]] = {
    "k0": ("rollout.max_staleness=0",),
    "k0_without_waiting": ("rollout.max_staleness=0", "environment.kwargs.shortest_s=0"),
    "k1": ("rollout.max_staleness=1",),
    "k2": ("rollout.max_staleness=2",),
    "in_flight_k1": ("rollout.max_staleness=1", "rollout.update=in_flight"),
    "in_flight_k2": ("rollout.max_staleness=2", "rollout.update=in_flight"),
}
SHAPE = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
ENVIRONMENT = """
import random
import time


class Sleeper:
    def __init__(self, shortest_s, longest_s, turns):
        self._shortest_s, self._longest_s, self._turns = shortest_s, longest_s, turns

    def reset(self, row, seed):
        self._seed, self._turn = seed, 0

    def step(self, text):
        self._turn += 1
        draw = random.Random(f"{self._seed}/{self._turn}").random()
        time.sleep(min(self._longest_s, self._shortest_s * (1 - draw) ** (-1 / 1.1)))
        return "go on", sum(c.islower() for c in text) / 16, self._turn == self._turns
"""


@dataclass(frozen=True)
class Job:
    """What every mode trains."""

    shortest_s: float
    longest_s: float
    """Of a call."""
    turns: int
    epochs: int
    """Passes over a batch: how long the training takes."""
    steps: int

    def write(self, folder: Path) -> Path:
        """Model, prompts, environment and configuration."""
        write_model(folder / "model", SHAPE, folder, seed=0)
        row = {"ground_truth": "", "style": "rule"}
        rows = [
            PromptRow("sleep", [{"role": "user", "content": f"word {number}"}], "letters", row)
            for number in range(64)
        ]
        write_parquet(rows, folder / "prompts.parquet", {})
        (folder / "sleeper.py").write_text(ENVIRONMENT)
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(self._config(folder)))
        return path

    def _config(self, folder: Path) -> dict[str, Any]:
        return {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {
                "train_files": [str(folder / "prompts.parquet")],
                "train_batch_size": PROMPTS,
                "max_prompt_length": 96,
                "max_response_length": 64 * self.turns,
            },
            "environment": {
                "path": str(folder / "sleeper.py"),
                "name": "Sleeper",
                "kwargs": {
                    "shortest_s": self.shortest_s,
                    "longest_s": self.longest_s,
                    "turns": self.turns,
                },
                "max_turns": self.turns,
                "max_turn_tokens": 24,
            },
            "reward": {"weights": {"environment": 1.0}},
            "actor": {
                "optim": {"lr": 1.0e-4},
                "ppo_mini_batch_size": PROMPTS,
                "ppo_micro_batch_size_per_gpu": 8,
                "ppo_epochs": self.epochs,
            },
            "rollout": {
                "dtype": "float32",
                "kv_cache_gib": 0.1,
                "threads": 1,
                "n": N,
                # Half of the ids, which random weights write: turns of two tokens.
                "stop_token_ids": list(range(4, 68)),
                "placement": "disaggregated",
                "canary_steps": 1,
            },
            "algorithm": {
                "adv_estimator": "grpo",
                "use_kl_in_reward": False,
                "rollout_correction": {"bypass_mode": True},
            },
            "trainer": {
                "total_training_steps": self.steps,
                "test_freq": 0,
                "save_at_end": False,
            },
            "cluster": {"platform": "cpu", "threads_per_rank": 1},
        }


def run(job: Path, output: Path, settings: Sequence[str], checkout: Path) -> list[dict[str, Any]]:
    """Train with the package of a checkout; the metrics of the steps that count."""
    command = [sys.executable, "-m", "rlhf3d.cli", "train", str(job)]
    subprocess.run(
        [*command, *settings, f"trainer.output_dir={output}"],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        cwd=checkout,
        check=True,
        timeout=600,
    )
    lines = (output / "metrics.jsonl").read_text().splitlines()
    # The last steps of a run have nothing to draw ahead.
    return [json.loads(line) for line in lines][BEFORE:-2]


def bounds(rows: Sequence[dict[str, Any]]) -> list[float]:
    """max(generate the next batch, train on this one) + sync, seconds, of steps of k0."""
    found = []
    for before, after in pairwise(rows):
        if after["step"] == before["step"] + 1:  # not the first one of another round
            this, following = sides_of(before), sides_of(after)
            found.append(max(following["writes"], this["trains"]) + following["sync"])
    return found


def sides_of(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of k0: what engines and environments do, the sync, and all else."""
    writes = row["timing_s/generate"] + row.get("timing_s/score", 0.0)
    sync = row["timing_s/sync_weights"]
    return {"writes": writes, "sync": sync, "trains": row["timing_s/step"] - writes - sync}


def step_s(rows: Sequence[dict[str, Any]]) -> float:
    """The median step."""
    return median(row["timing_s/step"] for row in rows)


def table(of_mode: dict[str, list[dict[str, Any]]]) -> str:
    """The measured modes as Markdown."""
    rows_of_k0 = of_mode["k0"]
    base, bound = step_s(rows_of_k0), median(bounds(rows_of_k0))
    sides = [sides_of(row) for row in rows_of_k0]
    parts = {name: median(side[name] for side in sides) for name in sides[0]}
    lines = [
        "k0: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items()),
        f"bound: {bound:.2f} s, {base / bound:.2f} x",
    ]
    if bare := of_mode.get("k0_without_waiting"):
        lines.append(f"waiting: {base - step_s(bare):.2f} s of {base:.2f} s")
    lines += [
        "",
        "| mode | s/step | k0 ÷ it | waits for samples, s | engines wait, s | overlap |",
        "|---|---|---|---|---|---|",
    ]
    for mode, rows in of_mode.items():
        seconds = step_s(rows)
        cells = [f"{seconds:.2f}", f"{base / seconds:.2f}"]
        for name in ("trainer_waited_s", "engines_waited_s", "overlap_share"):
            values = [row[f"async/{name}"] for row in rows if f"async/{name}" in row]
            cells.append(f"{median(values):.2f}" if values else "")
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shortest-s", type=float, default=0.18)
    parser.add_argument("--longest-s", type=float, default=1.8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/async_overlap"))
    parser.add_argument("--against", type=Path, help="another checkout, whose k0 is run too")
    args = parser.parse_args()
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = (args.shortest_s, args.longest_s, args.turns, args.epochs, args.steps)
    job = Job(*settings).write(folder)
    here = Path(__file__).resolve().parents[2]
    plans = {mode: (MODES[mode], here) for mode in args.modes}
    if args.against is not None:
        plans["k0 of the other"] = ((), args.against.resolve())
    of_mode: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for mode, (overrides, checkout) in plans.items():
            rows = run(job, folder / f"{mode.replace(' ', '_')}_{number}", overrides, checkout)
            of_mode.setdefault(mode, []).extend(rows)
            print(mode, [round(row["timing_s/step"], 2) for row in rows], flush=True)
    print(table(of_mode))


if __name__ == "__main__":
    main()
