"""The whole command, killed and preempted: what goes on is what would have been, to the bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from integration.test_learning import MARK, MARKED, left_behind, read_rows, train, write_job

from rlhf3d.checkpoints.manifest import read_manifest
from rlhf3d.trainer.preemption import SAME_SIGNAL_S

STEPS, SAVED = 6, 3


def job(folder: Path) -> Path:
    """A small quickstart: PPO with critic and reference on two data-parallel ranks."""
    return write_job(
        folder,
        actor={
            "layout": {"dp": 2},
            "optim": {"lr": 3.0e-3, "lr_decay_style": "linear", "lr_warmup_steps": 2},
            "ppo_mini_batch_size": 32,
            "ppo_micro_batch_size_per_gpu": 16,
        },
        algorithm={"use_kl_in_reward": True, "kl_ctrl": {"type": "adaptive", "kl_coef": 0.05}},
        trainer={
            "total_training_steps": STEPS,
            "output_dir": str(folder / "run"),
            "test_freq": 0,
            "save_freq": SAVED,
            "val_before_train": False,
        },
        cluster={"platform": "cpu", "threads_per_rank": 1},
    )


def stop_at(
    command: Path, step: int, act: Callable[[subprocess.Popen[str]], None], *overrides: str
) -> tuple[int, str]:
    """Run until the line of a step is out, act on the process; exit code and the end of what it printed."""
    line = [str(Path(sys.executable).with_name("rlhf3d")), "train", str(command), *overrides]
    with subprocess.Popen(
        line, env=MARKED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        seen = []
        for text in process.stdout:
            seen.append(text)
            if re.match(rf"step +{step}/", text):
                act(process)
                break
        rest = process.stdout.read()
        return process.wait(timeout=60), ("".join(seen) + rest)[-3000:]


def tell_everyone(number: int) -> None:
    """Send a signal to every process of the run, as service managers do."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(os.getpid()):
                process.send_signal(number)


def untimed(run: Path) -> list[dict[str, Any]]:
    """Metrics but for what is measured in seconds, and what a save and a sync report about themselves."""
    names = ("timing_s/", "perf/", "sync/", "checkpoint/", "reward/scoring")
    return [{k: v for k, v in row.items() if not k.startswith(names)} for row in read_rows(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(job(folder), "trainer.save_hf=always")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.timeout(1200)
def test_killed_and_resumed_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    command, run = job(tmp_path), tmp_path / "run"
    code, text = stop_at(command, SAVED + 2, lambda process: process.kill())
    assert code == -signal.SIGKILL, text
    assert [row["step"] for row in read_rows(run)][-1] > SAVED
    background = ("trainer.async_save=true", "trainer.save_freq=1", "trainer.keep_last=2")
    resumed = train(command, *background)
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-4000:]
    assert f"resume from step {SAVED}: {run}/checkpoints/step_{SAVED}" in resumed.stdout
    assert "changed trainer.async_save: False -> True" in resumed.stdout
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == [
        "step_5",
        "step_6",
    ]
    assert untimed(run) == untimed(whole / "run")
    for step in range(1, STEPS + 1):
        name = f"samples/step_{step}.jsonl"
        assert (run / name).read_bytes() == (whole / "run" / name).read_bytes()
    ours, theirs = (
        read_manifest(folder / "run" / "checkpoints" / f"step_{STEPS}")
        for folder in (tmp_path, whole)
    )
    tensors = [name for name in theirs.files if name.endswith((".distcp", ".safetensors"))]
    assert {name.split("/")[0] for name in tensors} == {"actor", "critic", "hf"}
    assert {name: ours.files[name] for name in tensors} == {
        name: theirs.files[name] for name in tensors
    }
    assert ours.policy_version == theirs.policy_version == STEPS
    first = next(row for row in read_rows(run) if row["step"] == SAVED + 1)
    assert first["sync/canary_abs_diff"] < 1e-4


@pytest.mark.timeout(1200)
def test_preempted_by_signal_and_by_time(tmp_path: Path) -> None:
    """SIGUSR1 ends after a checkpoint; a time limit after one step more; two signals at once, and leave nothing."""
    command, run = job(tmp_path), tmp_path / "run"
    shape = (
        "algorithm.adv_estimator=reinforce_plus_plus",
        "actor.layout.dp=1",
        "trainer.total_training_steps=10000",
    )
    shape += ("trainer.save_freq=0",)

    def steps() -> list[int]:
        return sorted(
            int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")
        )

    code, text = stop_at(command, 1, lambda _: tell_everyone(signal.SIGUSR1), *shape)
    assert code == 75 and "stopped: SIGUSR1 was received" in text and "the same command" in text, (
        text
    )
    (first,) = steps()
    assert [row["step"] for row in read_rows(run)] == list(range(1, first + 1))
    assert not (run / "checkpoints" / f"step_{first}" / "hf").exists()

    timed = train(command, *shape, "trainer.max_wall_clock_s=1")
    assert timed.returncode == 75 and "would pass trainer.max_wall_clock_s = 1" in timed.stdout, (
        timed.stderr[-4000:]
    )
    assert steps() == [first, first + 1]
    assert "changed trainer.max_wall_clock_s: None -> 1" in timed.stdout

    def twice(process: subprocess.Popen[str]) -> None:
        tell_everyone(signal.SIGTERM)
        time.sleep(2 * SAME_SIGNAL_S)
        tell_everyone(signal.SIGTERM)

    # A step of seconds: the second signal comes before the end that the first one asked for.
    code, text = stop_at(command, first + 3, twice, *shape, "actor.ppo_epochs=40")
    assert code == 130 and "interrupted" in text, text
    assert steps() == [first, first + 1] and left_behind() == set()
