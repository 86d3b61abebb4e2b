"""The complete command, stopped by signals and time: it saves, goes on, and leaves nothing behind.

In `make test` the runs of `test_ahead.py` are stopped by signals.

The job has a user's own algorithm and dynamic sampling on two context-parallel ranks. It goes on
behind what is written ahead.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.jobs import (
    left_behind,
    own_algorithm,
    read_rows,
    saved_steps,
    signal_everyone,
    stop_at,
    train,
    write_job,
)

from rlhf3d.observability.outcome import read_record
from rlhf3d.trainer.preemption import SAME_SIGNAL_S

WITHOUT_END = ("trainer.total_training_steps=10000", "trainer.save_freq=0")
# Engines take longer for a batch than an update does: some requests are always under way.
AHEAD = (
    "rollout.max_staleness=1",
    "rollout.placement=disaggregated",
    "rollout.max_num_seqs=8",
    "data.max_response_length=60",
)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_own_algorithm_goes_on_after_preemption_until_interrupted(tmp_path: Path) -> None:
    """SIGUSR1 ends after a checkpoint; the same job goes on; SIGINT ends at once.

    Engines that write ahead are told to stop while there is a Ray to tell it by.
    """
    job, run = write_job(tmp_path, algorithm=own_algorithm(tmp_path)), tmp_path / "run"
    settings = (
        "data.train_batch_size=16",
        "data.gen_batch_size=20",
        "actor.ppo_mini_batch_size=8",
        "rollout.n=4",
        "actor.policy_loss=squared_clip",
        "algorithm.filter_groups.enable=true",
        "algorithm.rollout_correction.rollout_is=token",
        "actor.layout.cp=2",
        "cluster.threads_per_rank=1",
        *WITHOUT_END,
    )
    code, text = stop_at(job, 7, lambda _: signal_everyone(signal.SIGUSR1), *settings)
    assert code == 75 and "SIGUSR1" in text, text
    assert str(read_record(run)) == "stopped: SIGUSR1 was received"
    (first,) = saved_steps(run)
    before, *rows = read_rows(run)
    assert [before["step"], *(row["step"] for row in rows)] == list(range(first + 1))
    assert not (run / "checkpoints" / f"step_{first}" / "hf").exists()
    assert rows[0]["critic/score/mean"] < 0.4
    assert rows[6]["filter_groups/generated_score/mean"] > 0.7
    for row in rows:
        assert row["reward/mixed_groups_share"] == 1 and row["train/num_gen_batches"] >= 1
        assert row["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1, abs=1e-4)

    settings = (*settings, *AHEAD)
    interrupt = lambda process: os.kill(process.pid, signal.SIGINT)  # noqa: E731
    code, text = stop_at(job, first + 2, interrupt, *settings)
    assert code == 130 and "interrupted" in text and "Traceback" not in text, text
    assert str(read_record(run)) == "stopped: interrupted"
    assert saved_steps(run) == [first] and left_behind() == set()
    rows = read_rows(run)[first + 1 :]
    assert [row["step"] for row in rows] == [*range(first + 1, first + 1 + len(rows))]
    assert len(rows) >= 1 and "actor/pg_loss" in rows[0]
    misspelt = train(job, "algorithm.adv_estimator=centred")
    assert misspelt.returncode == 2 and "did you mean centered?" in misspelt.stderr


@pytest.mark.full
@pytest.mark.timeout(900)
def test_time_limit_and_second_signal(tmp_path: Path) -> None:
    """A time limit ends after one step; two signals end at once, and leave nothing."""
    job, run = write_job(tmp_path), tmp_path / "run"
    shape = ("algorithm.adv_estimator=reinforce_plus_plus", *WITHOUT_END)
    timed = train(job, *shape, "trainer.max_wall_clock_s=1")
    assert timed.returncode == 75 and "trainer.max_wall_clock_s = 1" in timed.stdout, timed.stderr
    assert saved_steps(run) == [1]

    def twice(process: subprocess.Popen[str]) -> None:
        signal_everyone(signal.SIGTERM)
        time.sleep(2 * SAME_SIGNAL_S)
        signal_everyone(signal.SIGTERM)

    # A step of seconds: the second signal comes before the end that the first one asked for.
    code, text = stop_at(job, 3, twice, *shape, "actor.ppo_epochs=40")
    assert code == 130 and "interrupted" in text, text
    assert "trainer.max_wall_clock_s: 1.0 -> None" in text
    assert saved_steps(run) == [1] and left_behind() == set()


@pytest.mark.full
def test_failing_reward_function_ends_in_one_screen(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return 1 / 0\n"
    )
    failed = train(job, "trainer.val_before_train=false")
    assert failed.returncode == 1
    for part in ("ZeroDivisionError", "reward.max_error_rate", "4 of 64 completions"):
        assert part in failed.stderr
    assert len(failed.stderr.splitlines()) < 50
    assert left_behind() == set()
