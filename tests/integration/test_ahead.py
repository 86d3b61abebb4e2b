"""Training behind what is written ahead: the same run whenever it is run, stopped and continued.

One run is what the others are compared with, up to the step after which it loses an engine; in the
end it is interrupted. It has a user's own algorithm, on two context-parallel ranks.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.jobs import (
    left_behind,
    own_algorithm,
    read_rows,
    saved_steps,
    signal_everyone,
    stop_at,
    train,
    train_with_deaths,
    write_job,
)
from support.same_run import asked, assert_same
from support.tiny_models import make_tiny_model
from support.trained import ages

from rlhf3d.checkpoints.manifest import problems, read_manifest
from rlhf3d.observability.outcome import read_record

STEPS, SAVED, QUIET, LAST = 24, 4, 16, 20
GROUPS = ("rollout.n=4", "data.train_batch_size=16", "actor.ppo_mini_batch_size=8")
GRPO = ("algorithm={adv_estimator: grpo, use_kl_in_reward: false}", *GROUPS)
AHEAD = (
    "algorithm.rollout_correction.bypass_mode=true",
    "rollout.max_staleness=1",
    "rollout.engine_restarts=8",
    "trainer.sample_tokens=64",
    "cluster.threads_per_rank=1",
)
JOB = (
    *GROUPS,
    *AHEAD,
    "actor.policy_loss=squared_clip",
    "actor.layout.cp=2",
    "rollout.placement=disaggregated",
    # Long enough that some completions are answered while others are being written.
    "data.max_response_length=8",
    "rollout.max_num_seqs=8",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.save_freq={SAVED}",
    f"trainer.test_freq={SAVED}",
)
DAPO = (
    "data.max_response_length=2",
    "data.gen_batch_size=20",
    "algorithm.filter_groups={enable: true, max_num_gen_batches: 20}",
)
REWARD_MODEL = (
    *GRPO,
    "custom_reward_function.path=null",
    "reward.weights={reward_model: 2.0}",
    "reward_model={path: JUDGE, mean: 0.5, std: 4.0}",
)
REMAX = (
    "algorithm={adv_estimator: remax, use_kl_in_reward: true}",
    "rollout.engines=2",
    "actor.layout.dp=2",
    "actor.ppo_micro_batch_size_per_gpu=16",
)


# A batch for each step, and a validation before the first and after each save: this one is written
# beside a step after QUIET.
DEATH = f"ahead:{QUIET + 2 + 1 + QUIET // SAVED}:0:0"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, run once until it is interrupted; the folder of the run.

    Engines that write ahead are told to stop while there is a Ray to tell it by.
    """
    folder = tmp_path_factory.mktemp("ahead")
    job = write_job(folder, algorithm=own_algorithm(folder))
    interrupt = partial(send, signal.SIGINT)
    # One step later, as its samples come after its line.
    code, text = stop_at(job, LAST + 1, interrupt, *JOB, moments=DEATH)
    assert code == 130 and "interrupted" in text, text[-4000:]
    quiet, lost = text.split(f"kill {DEATH}")
    assert f"step {QUIET}/{STEPS}" in quiet and "are gone: those after" in lost
    assert "Traceback" not in lost[-3000:] and left_behind() == set()
    assert str(read_record(folder / "run")) == "stopped: interrupted"
    return folder / "run"


def send(number: int, process: subprocess.Popen[str]) -> None:
    """Send a signal to the driver alone."""
    os.kill(process.pid, number)


@pytest.mark.timeout(900)
def test_it_learns_from_tokens_that_are_one_update_old(once: Path) -> None:
    before, *rows = read_rows(once)
    assert [before["step"], *(row["step"] for row in rows)] == [*range(len(rows) + 1)]
    curve = [row["critic/score/mean"] for row in rows[:LAST]]
    print(f"LEARNING one update behind: first {curve[0]:.3f} last {curve[-1]:.3f}")
    assert curve[0] < 0.4 and curve[-1] > 0.8
    for row in rows:
        step, age = row["step"], min(1, row["step"] - 1)
        found = ages(once, step)
        # What dies under way is written again: by the same weights, or by the newest.
        assert found == {age} if step <= QUIET else found <= {0, 1}
        for end, read in (("min", min), ("max", max)):
            name = f"training/off_policy/trajectory_staleness_worst/{end}"
            assert row[name] == read(found)
        # Whatever is trained on, the newest weights are validated.
        if step % SAVED == 0:
            assert row["val-aux/policy_version"] == step
    # Each prompt once an epoch, of four steps: the engine that died lost none.
    for first in range(0, LAST, 4):
        epoch = sum(asked(once)[first : first + 4], Counter[str]())
        assert len(epoch) == 64 and set(epoch.values()) == {4}


def copy_without_the_end(once: Path, run: Path) -> None:
    """Copy what a kill before QUIET leaves."""
    shutil.copytree(once, run)
    for step in saved_steps(run):
        if step >= QUIET:
            shutil.rmtree(run / "checkpoints" / f"step_{step}")
    (run / "checkpoints" / "latest").write_text(f"step_{saved_steps(run)[-1]}")


def train_and_kill(once: Path, run: Path) -> None:
    """The same job, killed while something is written ahead."""
    job, settings = once.with_name("job.yaml"), (*JOB, f"trainer.output_dir={run}")
    # A save waits for what is written ahead: in the step after it, something is again.
    killed = train_with_deaths(job, f"ahead:{3 * SAVED}:driver", *settings)
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-2000:] + killed.stderr[-4000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "interrupt",
    [copy_without_the_end, pytest.param(train_and_kill, marks=pytest.mark.full)],
    ids=["copied", "killed"],
)
def test_killed_while_it_writes_ahead_it_goes_on_as_the_same_run(
    interrupt: Any, once: Path
) -> None:
    """A second run, which is killed, and then continued, with what its checkpoint has ahead.

    SIGUSR1 ends it after a checkpoint.
    """
    job, run = once.with_name("job.yaml"), once.with_name(interrupt.__name__)
    interrupt(once, run)
    saved = saved_steps(run)[-1]
    assert (run / "checkpoints" / f"step_{saved}" / "experience" / "queue.json").is_file()
    settings = (*JOB, f"trainer.output_dir={run}")
    code, text = stop_at(job, QUIET, lambda _: signal_everyone(signal.SIGUSR1), *settings)
    assert code == 75 and "SIGUSR1" in text, text[-4000:]
    assert f"resume from step {saved}" in text
    assert str(read_record(run)) == "stopped: SIGUSR1 was received"
    last = saved_steps(run)[-1]
    assert read_rows(run)[-1]["step"] == last >= QUIET
    checkpoint = run / "checkpoints" / f"step_{last}"
    assert problems(checkpoint, read_manifest(checkpoint)) == []
    assert not (checkpoint / "hf").exists()
    assert_same(run, once, QUIET)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_engines_that_die_in_every_phase_lose_no_sample(once: Path) -> None:
    """What was under way is written again: by the same weights, or by the newest."""
    moments = "ahead:3:0:0,score:6:1:0,update_actor:6:0:0,sync_weights:10:1:0,save:2:0:0"
    job, run, steps = once.with_name("job.yaml"), once.with_name("deaths"), 10
    end = f"trainer.total_training_steps={steps}"
    settings = (*JOB, "rollout.engines=2", f"trainer.output_dir={run}", end)
    deaths = train_with_deaths(job, moments, *settings)
    assert deaths.returncode == 0, deaths.stdout[-2000:] + deaths.stderr[-4000:]
    for moment in moments.split(","):
        assert f"kill {moment}" in deaths.stdout
    assert "are gone: those after" in deaths.stdout
    assert asked(run) == asked(once)[:steps]
    for step in range(1, steps + 1):
        assert ages(run, step) <= {0, 1}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_trainers_and_drivers_that_die_in_any_phase_change_nothing(once: Path) -> None:
    """One run, started again after each death."""
    job, run = once.with_name("job.yaml"), once.with_name("matrix")
    end = f"trainer.total_training_steps={QUIET}"
    settings = (*JOB, f"trainer.output_dir={run}", "trainer.save_freq=1", end)
    for who in ("driver", "trainer:0"):
        for phase in ("ahead:4", "score:4", "update_actor:2", "sync_weights:3", "save:2"):
            died = train_with_deaths(job, f"{phase}:{who}", *settings)
            assert f"kill {phase}:{who}" in died.stdout
            assert died.returncode == (-signal.SIGKILL if who == "driver" else 1), died.stderr
    finished = train(job, *settings)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    assert_same(run, once)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "staleness, changes",
    [
        (1, ()),
        (2, ("actor.layout={tp: 2, pp: 2}", "rollout.placement=disaggregated")),
        (2, (*GRPO, *DAPO)),
        (1, REMAX),
        (1, REWARD_MODEL),
    ],
    ids=["ppo", "ppo, placed apart", "dapo", "remax", "reward model"],
)
def test_preempted_killed_and_continued_it_is_the_same_run(
    staleness: int, changes: tuple[str, ...], tmp_path: Path
) -> None:
    job, once, again = write_job(tmp_path), tmp_path / "once", tmp_path / "again"
    judge = make_tiny_model(tmp_path / "judge", tie=False, classifier=True)
    settings = (
        *AHEAD,
        *(change.replace("JUDGE", str(judge)) for change in changes),
        f"rollout.max_staleness={staleness}",
        "trainer.total_training_steps=7",
        "trainer.save_freq=2",
        # At no step that a preemption may end: such a step leaves its validation out.
        "trainer.test_freq=5",
    )
    run_twice(job, settings, once, again)
    for step in range(1, 8):
        assert ages(once, step) == {min(staleness, step - 1)}
    assert_same(again, once)


def run_twice(job: Path, settings: tuple[str, ...], once: Path, again: Path) -> None:
    """Run a job, and again with a preemption and a kill of all its processes."""
    finished = train(job, *settings, f"trainer.output_dir={once}")
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    settings = (*settings, f"trainer.output_dir={again}")
    code, text = stop_at(job, 1, lambda _: signal_everyone(signal.SIGTERM), *settings)
    assert code == 75, text
    last = saved_steps(again)[-1]
    code, text = stop_at(job, last + 3, lambda process: os.kill(process.pid, 9), *settings)
    assert code == -signal.SIGKILL and f"resume from step {last}" in text, text
    assert saved_steps(again)[-1] > last
    finished = train(job, *settings)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


LEARNS = {
    "grpo in turn": (GRPO, 0, "between_batches"),
    "ppo, 1 in flight": ((), 1, "in_flight"),
    "grpo, 1 ahead": (GRPO, 1, "between_batches"),
    "ppo, 2 ahead": ((), 2, "between_batches"),
    "grpo, 2 in flight": (GRPO, 2, "in_flight"),
    "ppo, 4 in flight": ((), 4, "in_flight"),
    "grpo, 4 ahead": (GRPO, 4, "between_batches"),
}
"""Each pair of algorithm, staleness and update once; PPO in turn is `test_learning.py`'s."""


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("changes", "staleness", "update"), list(LEARNS.values()), ids=list(LEARNS)
)
def test_it_learns_however_old_the_tokens_are(
    changes: tuple[str, ...], staleness: int, update: str, tmp_path: Path
) -> None:
    # A seed of the table in docs/async.md, with which these can be compared.
    settings = [*changes, f"rollout.max_staleness={staleness}", "trainer.seed=1"]
    # The older the tokens, the later it has learned.
    settings.append(f"trainer.total_training_steps={24 + 8 * staleness}")
    if staleness:
        settings.append("algorithm.rollout_correction.bypass_mode=true")
    if update == "in_flight":
        settings += ["rollout.update=in_flight", "rollout.placement=disaggregated"]
    finished = train(write_job(tmp_path), "cluster.threads_per_rank=1", *settings)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    rows = read_rows(tmp_path / "run")
    scores = [row["critic/score/mean"] for row in rows[1:]]
    above = next((step for step, score in enumerate(scores, 1) if score > 0.9), None)
    print(f"LEARNING {update} staleness {staleness}: step 24 {scores[23]:.3f}, the last")
    print(f"{scores[-1]:.3f}, above 0.9 from step {above}")
    assert scores[0] < 0.4 and scores[-1] > 0.9
