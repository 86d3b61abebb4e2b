"""Look it up, then answer: a random model learns two turns, by one curve in any layout.

What is looked up differs from trajectory to trajectory, so that only the answer of the environment
tells it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs import left_behind, read_rows, train
from support.tiny_models import SPECIAL_TOKENS, make_tiny_model, word_tokenizer

from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow

KEYS = ("red", "green", "blue", "white")
VALUES = ("one", "two", "three", "four")
WORDS = (*KEYS, *VALUES, "nothing", "system", "user", "assistant")
STEPS, SAME = 36, 8
ENVIRONMENT = f'''
import random


class Lookup:
    """The question is a key. A turn that looks a key up, and a turn that says its value."""

    def reset(self, row, seed):
        choose = random.Random(seed).choice
        self.table = {{key: choice for key in {KEYS} for choice in [choose({VALUES})]}}
        self.key, self.looked_up = row["reward_model"]["ground_truth"], None

    def step(self, text):
        if self.looked_up is None:
            self.looked_up = text.strip()
            found = self.table.get(self.looked_up, "nothing")
            return found, 0.2 * (self.looked_up == self.key), False
        right = self.looked_up == self.key and text.strip() == self.table[self.key]
        return None, 0.8 * right, True
'''


def write_job(folder: Path, layout: dict[str, Any]) -> Path:
    """A job whose model has a token for each of WORDS, and nothing learned."""
    make_tiny_model(
        folder / "model",
        layers=2,
        heads=2,
        vocab=len(SPECIAL_TOKENS) + len(WORDS),
        seed=2,
        tokenizer=word_tokenizer(WORDS),
    )
    rows = [
        PromptRow(
            "tiny", [{"role": "user", "content": key}], "lookup", {"ground_truth": key, "index": i}
        )
        for i, key in enumerate(KEYS * 4)
    ]
    write_parquet(rows, folder / "prompts.parquet", {})
    (folder / "lookup.py").write_text(ENVIRONMENT)
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train_files": [str(folder / "prompts.parquet")],
            "val_files": [str(folder / "prompts.parquet")],
            "train_batch_size": 16,
            "max_prompt_length": 8,
            "max_response_length": 16,
        },
        "environment": {
            "path": str(folder / "lookup.py"),
            "name": "Lookup",
            "max_turns": 2,
            "max_turn_tokens": 1,
            "rounds": True,
        },
        "actor": {
            "layout": layout,
            "optim": {"lr": 2.0e-3, "weight_decay": 0.0},
            "entropy_coeff": 0.05,  # else it may settle on one value for two
            "ppo_mini_batch_size": 8,
            "ppo_micro_batch_size_per_gpu": 64,
        },
        "rollout": {
            "n": 8,
            "dtype": "float32",
            "kv_cache_gib": 0.1,
            "threads": 1,
            # Each key and each value ends a turn: a turn is a word.
            "stop_token_ids": list(range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 9)),
            "max_num_seqs": 128,
        },
        "algorithm": {"adv_estimator": "reinforce_plus_plus"},
        "reward": {"weights": {"environment": 1.0}},
        "trainer": {
            "total_training_steps": STEPS,
            "output_dir": str(folder / "run"),
            "test_freq": 0,
            "save_at_end": False,
        },
        "cluster": {"platform": "cpu", "threads_per_rank": 1},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_job(folder: Path, layout: dict[str, Any]) -> Path:
    """Train in a layout; the folder of the run."""
    finished = train(write_job(folder, layout))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return folder / "run"


def check_learned(run: Path) -> None:
    """A random model answers right in the end."""
    rows = read_rows(run)
    curve = [row["critic/score/mean"] for row in rows[1:]]
    print(f"LOOKUP {run}: {' '.join(f'{score:.2f}' for score in curve)}")
    assert curve[0] < 0.2
    # 0.2 of it for the first turn: nine answers in ten are right.
    assert min(curve[-3:]) > 0.2 + 0.8 * 0.9
    assert rows[-1]["num_turns/mean"] > 1.9
    assert max(row["training/rollout_logprobs_diff_max"] for row in rows[1:]) < 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job on one rank."""
    return run_job(tmp_path_factory.mktemp("one"), {})


@pytest.mark.timeout(900)
def test_learns_to_look_up_and_to_answer(run: Path) -> None:
    check_learned(run)
    assert left_behind() == set()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_learns_by_the_same_curve_in_another_layout(run: Path, tmp_path: Path) -> None:
    other = run_job(tmp_path, {"tp": 2, "pp": 2})
    check_learned(other)
    # Later a token is drawn otherwise, as round-off grows with the steps; then the curves part.
    curves = (read_rows(one)[1 : 1 + SAME] for one in (run, other))
    for first, second in zip(*curves, strict=True):
        for metric in ("critic/score/mean", "num_turns/mean"):
            assert first[metric] == pytest.approx(second[metric], abs=1e-6)
        for metric in ("actor/pg_loss", "actor/grad_norm"):
            assert first[metric] == pytest.approx(second[metric], rel=5e-3, abs=1e-5)


def test_samples_show_who_said_what(run: Path) -> None:
    lines = (run / "samples" / f"step_{STEPS}.jsonl").read_text().splitlines()
    turns = [json.loads(line)["turns"] for line in lines]
    for said in turns:
        assert [turn["role"] for turn in said] == ["assistant", "user", "assistant"][: len(said)]
    copied = [said[1]["content"] == said[2]["content"].strip() for said in turns if len(said) == 3]
    assert sum(copied) > 0.9 * len(turns)
