"""A run with an environment of three turns, whose template forgets some of them.

Some of its environments fail: they are left out. It is resumed exactly, and is the same in another
layout.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import read_rows, sample_rows, saved_steps, stop_at, train, write_job
from support.same_run import assert_same, untimed
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.evaluation.mismatch import examine
from rlhf3d.observability.tokens import read_tokens, tokens_path
from rlhf3d.rehearsal.miniature import CHAT_TEMPLATE

STEPS, SAVED, TURNS = 6, 3, 3
ENVIRONMENT = f'''
import random


class Letters:
    """Rewards each turn that begins with a lower-case letter; some fail at their second turn."""

    def reset(self, row, seed):
        self.turns, self._luck = 0, random.Random(seed).random()
        return row["says"]

    def step(self, text):
        self.turns += 1
        if self.turns == 2 and self._luck < 0.03:
            raise KeyError("no such letter")
        return "more", float(text[:1].islower()) / {TURNS}, self.turns == {TURNS}
'''
FORGETFUL = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['role'] != 'assistant' or m['content'][:1] not in '" + ascii_lowercase + "' %}"
    "{{ m['content'] }}{% endif %}",
)
"""What the assistant said is left out where it began with a lower-case letter: a new row begins."""
PPO = (
    "algorithm={adv_estimator: gae, use_kl_in_reward: true}",
    "actor.policy_loss=vanilla",
)
BEHIND = ("rollout.max_staleness=2", "algorithm.rollout_correction.bypass_mode=true")
OTHER_LAYOUT = (
    "actor.layout.tp=2",
    "actor.layout.pp=2",
    "rollout.engines=2",
    "model.use_remove_padding=true",
    "actor.use_dynamic_bsz=true",
    "actor.ppo_max_token_len_per_gpu=700",
)


def settings(folder: Path, run: str) -> list[str]:
    """Overrides of the tiny job; each token of text ends a turn, so that turns are short.

    Its data is as data sets made for TRL are: a prompt, and columns for the environment.
    """
    rows = {"prompt": [f"word {number}" for number in range(64)], "says": ["go"] * 64}
    pq.write_table(pa.table(rows), folder / "trl.parquet")
    (folder / "letters.py").write_text(ENVIRONMENT)
    (folder / "forgetful.jinja").write_text(FORGETFUL)
    return [
        f"model.chat_template={folder}/forgetful.jinja",
        f"data={{train_files: {folder}/trl.parquet, val_files: {folder}/trl.parquet}}",
        f"environment={{path: {folder}/letters.py, name: Letters, retries: 0}}",
        "environment.max_error_rate=0.5",
        f"environment.max_turns={TURNS}",
        "environment.max_turn_tokens=6",
        "environment.rounds=true",
        "reward.weights={environment: 1.0}",
        "custom_reward_function.path=null",
        "data.train_batch_size=16",
        "data.max_prompt_length=60",
        "data.max_response_length=160",
        f"rollout.stop_token_ids={list(range(4, 128))}",
        "rollout.n=4",
        "algorithm={adv_estimator: grpo, use_kl_in_reward: false}",
        # Its ratio needs all rows of a trajectory.
        "actor.policy_loss=gspo",
        "actor.ppo_mini_batch_size=8",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.save_freq={SAVED}",
        "trainer.sample_tokens=64",
        f"trainer.output_dir={folder / run}",
        "cluster.threads_per_rank=1",
    ]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, run once; the folder of the run."""
    folder = tmp_path_factory.mktemp("letters")
    finished = train(write_job(folder), *settings(folder, "once"))
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    assert "new rows begin where the assistant is answered by role 'user'" in finished.stdout
    assert "env_error in a trajectory of row" in finished.stdout
    return folder / "once"


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Metrics of the training steps."""
    return [row for row in read_rows(run) if row["step"] > 0]


@pytest.mark.timeout(900)
def test_engine_and_trainer_agree_on_every_turn(once: Path) -> None:
    found = examine(once)
    assert found.diagnosis.verdict == "healthy" and found.settings.precision == "float32"
    assert found.summary.all.abs_mean < 1e-5 and found.summary.all.tokens > 1000


@pytest.mark.timeout(900)
def test_failed_environments_are_left_out(once: Path) -> None:
    rows = steps_of(once)
    assert rows[-1]["critic/score/mean"] > rows[0]["critic/score/mean"] + 0.2
    for row in rows:
        failed, left_out = row["env/outcome/env_error"], row["env/groups_left_out"]
        assert failed >= left_out > 0 or failed == left_out == 0
        samples = sample_rows(once, row["step"])
        assert len(samples) == 4 * (16 - left_out) + failed
        assert 4 * (16 - left_out) == row["reward/outcome/scored"]
        assert row["num_turns/mean"] == row["num_turns/max"] == TURNS
        # Engine and trainer agree on the tokens of every turn.
        assert row["training/rollout_logprobs_diff_max"] < 1e-3
        turns = samples[0]["turns"]
        assert [turn["role"] for turn in turns] == ["assistant", "user"] * 2 + ["assistant"]
    assert sum(row["env/groups_left_out"] for row in rows) > 0


def test_each_turn_is_trained_on_once_behind_what_the_template_made_of_the_others(
    once: Path,
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = FORGETFUL
    numbers = set()
    for metrics in steps_of(once):
        kept = read_tokens(tokens_path(once, metrics["step"]))
        several = sum(len(one.rows) > 1 for one in kept)
        assert 0 < several == metrics["env/rows_restarted"]
        written = sample_rows(once, metrics["step"])
        samples = [sample for sample in written if sample["outcome"] == "scored"]
        for one, sample in zip(kept, samples, strict=True):
            numbers.add(len(one.rows))
            assert len(one.differences) == one.tokens_of("sampled")
            assert one.largest_difference < 1e-3
            said = 0
            for prompt, *spans in one.rows:
                history = [{"role": "user", "content": sample["prompt"]}]
                history += sample["turns"][: 2 * said]
                shown = tokenizer.apply_chat_template(
                    history, add_generation_prompt=True, return_dict=False
                )
                assert list(prompt.token_ids) == list(shown)
                for span in spans:
                    if span.author == "sampled":
                        text = tokenizer.decode(list(span.token_ids)).removesuffix("<|im_end|>")
                        assert text == sample["turns"][2 * said]["content"]
                        said += 1
            assert said == TURNS
    assert numbers == {1, 2, 3}


@pytest.mark.timeout(900)
def test_resumed_is_the_same_run_to_the_bit(once: Path) -> None:
    again, folder = once.with_name("again"), once.parent
    shutil.copytree(once, again)
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS}")
    (again / "checkpoints" / "latest").write_text(f"step_{SAVED}")
    resumed = train(folder / "job.yaml", *settings(folder, "again"))
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-4000:]
    assert f"resume from step {SAVED}" in resumed.stdout
    assert_same(again, once)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("behind", [(), BEHIND], ids=["on-policy", "two updates behind"])
def test_ppo_whose_driver_is_killed_is_the_same_run_to_the_bit(
    behind: tuple[str, ...], tmp_path: Path
) -> None:
    """With a critic over the rows of a trajectory."""
    job, whole, killed = write_job(tmp_path), tmp_path / "whole", tmp_path / "killed"
    finished = train(job, *settings(tmp_path, "whole"), *PPO, *behind)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    for row in steps_of(whole):
        assert row["env/rows_restarted"] > 0 and row["critic/vf_loss"] > 0
    own = (*settings(tmp_path, "killed"), *PPO, *behind)
    code, text = stop_at(job, SAVED + 2, lambda process: process.kill(), *own)
    assert code == -signal.SIGKILL, text
    # Its line is shown before its row is written.
    assert saved_steps(killed) == [SAVED] and read_rows(killed)[-1]["step"] > SAVED
    resumed = train(job, *own)
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-4000:]
    assert f"resume from step {SAVED}" in resumed.stdout
    assert_same(killed, whole)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_same_numbers_in_another_layout(once: Path) -> None:
    """On TP2 x PP2 with packed rows of a budget, and two engines."""
    folder, other = once.parent, once.with_name("other")
    finished = train(folder / "job.yaml", *settings(folder, "other"), *OTHER_LAYOUT)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    for ours, theirs in zip(untimed(other, STEPS)[1:], untimed(once, STEPS)[1:], strict=True):
        assert sample_rows(other, ours["step"]) == sample_rows(once, ours["step"])
        for name, value in theirs.items():
            # Of two runs' rounding alone.
            if name.startswith(("rollout_corr/", "training/rollout_")):
                continue
            # Of a first step some have no value, and some are names.
            if isinstance(value, float | int):
                value = pytest.approx(value, rel=1e-3, abs=1e-5)
            assert ours[name] == value, name
