"""Weights that enter while requests run, in a complete run: who wrote each token is true, nothing
is lost, and the journal gives the same run again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from support.certificate import span_certificate
from support.jobs import (
    MARKED,
    left_behind,
    read_rows,
    sample_rows,
    saved_steps,
    train,
    train_with_deaths,
    write_job,
)
from support.judge import hf_scores
from support.tiny_models import make_tiny_model
from support.trained import ages, kept_names
from transformers import AutoModelForCausalLM

from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.observability.tokens import TokenSpan, read_tokens, tokens_path
from rlhf3d.placement.journal import read_journal
from rlhf3d.rewards.score import ScoreItem

STEPS, STALENESS, BATCH, SAMPLES = 8, 2, 8, 2
JOB = (
    f"trainer.total_training_steps={STEPS}",
    f"rollout.max_staleness={STALENESS}",
    "rollout.update=in_flight",
    "rollout.placement=disaggregated",
    "rollout.max_num_seqs=8",
    f"rollout.n={SAMPLES}",
    "rollout.engine_restarts=9",
    "algorithm={adv_estimator: grpo, use_kl_in_reward: false}",
    "algorithm.rollout_correction.bypass_mode=true",
    f"data.train_batch_size={BATCH}",
    "data.max_response_length=40",  # longer than an update
    f"actor.ppo_mini_batch_size={BATCH}",
    f"actor.ppo_micro_batch_size_per_gpu={BATCH}",
    "trainer.save_freq=1",
    f"trainer.sample_tokens={BATCH * SAMPLES}",
    "trainer.val_before_train=false",
    "cluster.threads_per_rank=1",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was run, with the weights of each version.

    The driver dies in the training that follows a save, with requests under way; then the engine.
    """
    folder = tmp_path_factory.mktemp("in_flight")
    file, run, settings = write_job(folder), folder / "run", (*JOB, "trainer.save_hf=always")
    died = train_with_deaths(file, "ahead:52:driver", *settings)
    assert died.returncode == -signal.SIGKILL, died.stdout[-2000:] + died.stderr[-4000:]
    saved = saved_steps(run)[-1]
    queue = json.loads((run / f"checkpoints/step_{saved}/experience/queue.json").read_text())
    assert queue["counts"]["unfinished"] > 0
    done = train_with_deaths(file, "ahead:8:0:0", *settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"resume from step {saved}" in done.stdout and "engine 0 died" in done.stdout
    return folder


def trajectories(run: Path) -> list[Trajectory]:
    """All that was trained on, as the files of tokens have it."""
    found = []
    for step in range(1, STEPS + 1):
        for one in read_tokens(tokens_path(run, step)):
            rows = []
            for prompt, *spans in one.rows:
                rows.append(Row(tuple(prompt.token_ids), tuple(map(_span, spans))))
            found.append(Trajectory(None, one.group, tuple(rows), "stop"))  # type: ignore[arg-type]
    return found


def _span(span: TokenSpan) -> Span:
    assert span.author == "sampled"
    logprobs = [value for value in span.rollout_logprobs if value is not None]
    versions = tuple((first, version) for first, version in span.versions)
    return Span("sampled", tuple(span.token_ids), tuple(logprobs), versions)


@pytest.mark.timeout(600)
def test_each_token_has_the_log_prob_of_the_version_that_wrote_it(job: Path) -> None:
    """By transformers, on the actor as it was saved after each update."""
    checkpoints = job / "run" / "checkpoints"

    @cache
    def model(version: int) -> torch.nn.Module:
        folder = job / "model" if version == 0 else checkpoints / f"step_{version}" / "hf"
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return loaded.eval()

    @torch.no_grad()
    def under(version: int, rows: Sequence[Row]) -> list[list[float]]:
        scores = []
        for row in rows:
            ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
            logprobs = model(version)(ids).logits[0, :-1].log_softmax(-1)
            each = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
            scores.append(each[len(row.prompt_ids) - 1 :].tolist())
        return scores

    found = trajectories(job / "run")
    mixed = [one for one in found if one.oldest_version < one.newest_version]
    assert len(mixed) >= 4, "weights entered while these were written"
    certificate = span_certificate(found, under)
    for version, agreement in certificate.items():
        print(f"CERTIFICATE version {version}: {agreement}")
        assert agreement.largest < 1e-4
    # Not by any other version's: what was written before and after an update differs.
    wrong = span_certificate(mixed, lambda version, rows: under(max(0, version - 1), rows))
    assert max(agreement.largest for agreement in wrong.values()) > 1e-2


@pytest.mark.timeout(600)
def test_the_journal_gives_the_same_run_again(job: Path) -> None:
    """As far as the driver lived."""
    command = [str(Path(sys.executable).with_name("rlhf3d")), "replay", str(job / "run")]
    done = subprocess.run(command, env=MARKED, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second = read_journal(job / "run")
    repeated = [row["step"] for row in read_rows(job / "run" / "replay")]
    assert repeated == [*range(1, second.begin + 1)] and second.begin >= 3
    assert first.begin == 0 and second.restarted


def assert_each_once(run: Path) -> None:
    """The steps that were kept trained on each sample of each prompt once, and in time."""
    steps = range(1, STEPS + 1)  # one epoch
    assert [row["step"] for row in read_rows(run)] == [*steps]
    kept = kept_names(run)
    assert sorted(kept) == [*steps]
    found: Counter[tuple[int, int]] = Counter()
    for step, names in kept.items():
        drawn = [tuple(int(part[1:]) for part in name.split(".")) for name in names]
        found.update((row, sample) for _, row, sample in drawn)
        # What was trained on is what these names say.
        asked = Counter(one["prompt"] for one in sample_rows(run, step))
        assert asked == Counter(f"word {row}" for _, row, _ in drawn)
        assert ages(run, step) <= {*range(min(STALENESS, step - 1) + 1)}
    assert found == Counter(product(range(STEPS * BATCH), range(SAMPLES)))
    assert left_behind() == set()


def test_after_the_driver_and_the_engine_died_each_is_trained_on_once(job: Path) -> None:
    assert_each_once(job / "run")
    worst = [
        row["training/off_policy/trajectory_staleness_worst/max"] for row in read_rows(job / "run")
    ]
    assert max(worst) >= 1
    assert all(age <= min(STALENESS, step) for step, age in enumerate(worst))


PHASES = ("ahead:28", "score:12", "update_actor:2", "sync_weights:3", "save:2")
"""When in a start: during generation beside training, while a group is scored, …"""


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("who", ["trainer:0", "driver"])
def test_after_deaths_in_every_phase_each_is_trained_on_once(who: str, tmp_path: Path) -> None:
    """One run, started again after each death."""
    job, run = write_job(tmp_path), tmp_path / "run"
    for phase in PHASES:
        died = train_with_deaths(job, f"{phase}:{who}", *JOB)
        assert f"kill {phase}:{who}" in died.stdout, died.stdout[-2000:] + died.stderr[-4000:]
        if who == "driver":
            assert died.returncode == -signal.SIGKILL
        else:
            # Which rank it was, and nothing is left of the others.
            assert died.returncode == 1 and "actor" in died.stderr, died.stderr[-4000:]
            assert left_behind() == set()
    finished = train(job, *JOB)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    assert_each_once(run)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_after_engines_died_in_every_phase_each_is_trained_on_once(tmp_path: Path) -> None:
    moments = [f"{phase}:0:0" for phase in ("generate:4", *PHASES)]
    job, run = write_job(tmp_path), tmp_path / "run"
    finished = train_with_deaths(job, ",".join(moments), *JOB)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    for moment in moments:
        assert f"kill {moment}" in finished.stdout
    assert_each_once(run)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_reward_model_scores_on_ranks_that_train_meanwhile(tmp_path: Path) -> None:
    """Its ranks are those that update the actor: no score is lost or of other weights."""
    judge = make_tiny_model(tmp_path / "judge", tie=False, seed=5, classifier=True)
    settings = (
        *JOB,
        "custom_reward_function.path=null",
        "reward.weights={reward_model: 2.0}",
        f"reward_model={{path: {judge}, mean: 0.5, std: 4.0}}",
    )
    finished = train(write_job(tmp_path), *settings)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    run = tmp_path / "run"
    assert_each_once(run)
    rows = read_rows(run)
    assert max(row["training/off_policy/trajectory_staleness_worst/max"] for row in rows) >= 1
    for step in range(1, STEPS + 1):
        items, found = [], []
        for sample in sample_rows(run, step):
            asked = [{"role": "user", "content": sample["prompt"]}]
            items.append(ScoreItem("tiny", sample["response"], None, messages=asked))
            found.append(sample["score"])
        expected = 2.0 * (hf_scores(judge, items) - 0.5) / 4.0
        assert torch.allclose(torch.tensor(found), expected, atol=1e-5)
