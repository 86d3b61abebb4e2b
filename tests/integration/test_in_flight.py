"""Weights that enter while requests run, in a complete run: who wrote each token is true, nothing
is lost, and the journal gives the same run again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from support.jobs import MARKED, read_rows, train, write_job
from transformers import AutoModelForCausalLM

from rlhf3d.experience.certificate import span_certificate
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.observability.tokens import TokenSpan, read_tokens, tokens_path
from rlhf3d.placement.journal import read_journal

STEPS, STALENESS, BATCH = 8, 2, 8
JOB = (
    f"trainer.total_training_steps={STEPS}",
    f"rollout.max_staleness={STALENESS}",
    "rollout.update=in_flight",
    "rollout.placement=disaggregated",
    "rollout.max_num_seqs=16",
    "algorithm.rollout_correction.bypass_mode=true",
    f"data.train_batch_size={BATCH}",
    "data.max_response_length=100",  # several updates long
    f"actor.ppo_mini_batch_size={BATCH}",
    f"actor.ppo_micro_batch_size_per_gpu={BATCH}",
    "trainer.save_freq=1",
    "trainer.save_hf=always",
    "trainer.save_optimizer=false",
    f"trainer.sample_tokens={BATCH}",
    "trainer.val_before_train=false",
    "cluster.threads_per_rank=1",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was run, with the weights of each version."""
    folder = tmp_path_factory.mktemp("in_flight")
    done = train(write_job(folder), *JOB)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
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


def test_nothing_is_too_old_and_each_trajectory_is_trained_on_once(job: Path) -> None:
    rows = read_rows(job / "run")[-STEPS:]
    for row in rows:
        worst = row["training/off_policy/trajectory_staleness_worst/max"]
        assert worst <= min(STALENESS, row["step"] - 1)
    assert max(row["training/off_policy/trajectory_staleness_worst/max"] for row in rows) >= 1
    (segment,) = read_journal(job / "run")
    names: list[str] = []
    for step in range(1, STEPS + 1):
        names += segment.steps[step]
    assert len(names) == len(set(names)) == STEPS * BATCH
    # 64 rows are one epoch of eight batches, so each prompt is there once.
    assert len({name.split(".")[1] for name in names}) == STEPS * BATCH


@pytest.mark.timeout(600)
def test_the_journal_gives_the_same_run_again(job: Path) -> None:
    command = [str(Path(sys.executable).with_name("rlhf3d")), "replay", str(job / "run")]
    done = subprocess.run(command, env=MARKED, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
