"""The complete command on one GPU and on two.

It trains, rests, saves, resumes exactly, and takes the memory planned.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.gpu_target import Target, used_mib
from support.jobs import read_rows, train, write_job

from rlhf3d.models.hf_io import HFReader

STEPS = 4
CANARY = 0.05


def job(folder: Path, target: Target, dtype: str) -> tuple[Path, list[str]]:
    """A tiny PPO job for the target's devices."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_job(folder)
    overrides = [
        f"trainer.total_training_steps={STEPS}",
        f"model.dtype={dtype}",
        f"rollout.dtype={dtype}",
    ]
    if target.is_gpu:
        overrides += [
            "cluster.platform=cuda",
            "cluster.gpus_per_node=1",
            "rollout.gpu_memory_utilization=0.3",
        ]
    return path, overrides


@contextmanager
def peak_memory(target: Target) -> Iterator[list[int]]:
    """MiB in use on the first GPU, sampled while the block runs."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.2):
            samples.append(used_mib())

    thread = threading.Thread(target=sample, daemon=True)
    if target.is_gpu:
        thread.start()
    try:
        yield samples
    finally:
        ended.set()
        if target.is_gpu:
            thread.join()


def run(path: Path, overrides: list[str]) -> list[dict]:
    done = train(path, *overrides)
    assert done.returncode == 0, done.stderr[-6000:]
    return read_rows(path.parent / "run")


def same_weights(one: Path, other: Path) -> bool:
    with HFReader(one) as ours, HFReader(other) as theirs:
        names = ours.names()
        full = [(name, tuple((0, n) for n in ours.shape(name))) for name in names]
        return names == theirs.names() and all(
            ours.read(*at).equal(theirs.read(*at)) for at in full
        )


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_trains_rests_and_resumes(target: Target, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more are four steps.

    Engine and trainer agree; memory is what the plan says.
    """
    path, overrides = job(tmp_path / "whole", target, "bfloat16" if target.is_gpu else "float32")
    overrides += [
        "rollout.sleep=true",
        "model.offload=true",
        "trainer.save_hf=always",
        "trainer.save_freq=2",
    ]
    with peak_memory(target) as samples:
        rows = run(path, overrides)
    steps = [row for row in rows if row["step"] > 0]
    canaries = [row["sync/canary_abs_diff"] for row in steps if "sync/canary_abs_diff" in row]
    # Of a step's work alone: the last step also validates and exports.
    times = [row["timing_s/old_logprobs"] + row["timing_s/update_actor"] for row in steps]
    peak_mib = max(samples, default=0)
    print(
        f"RUN canary {max(canaries):.1e}, "
        f"old_logprobs and update_actor {times} s, peak {peak_mib} MiB"
    )
    assert max(canaries) < CANARY
    if target.is_gpu:
        assert times[-1] < 1.2 * times[-2] + 0.2
        planned = plan_peak_mib(path, overrides)
        assert abs(max(samples) - planned) < 0.1 * planned + 512, f"planned {planned:.0f} MiB"
    again, overrides_again = job(
        tmp_path / "again", target, "bfloat16" if target.is_gpu else "float32"
    )
    overrides_again += overrides[len(overrides_again) :]
    first = path.parent / "run" / "checkpoints"
    run(again, [*overrides_again, f"trainer.resume_mode={first / 'step_2'}"])
    second = again.parent / "run" / "checkpoints"
    assert same_weights(first / f"step_{STEPS}" / "hf", second / f"step_{STEPS}" / "hf")


def plan_peak_mib(path: Path, overrides: list[str]) -> float:
    """What `rlhf3d plan` says of the fullest phase of the first GPU."""
    command = [
        str(Path(sys.executable).with_name("rlhf3d")),
        "plan",
        str(path),
        *overrides,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return float(json.loads(done.stdout)["memory"]["peak"]["bytes"]) / 2**20


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32"])
def test_float32_is_not_rounded(dtype: str, target: Target, tmp_path: Path) -> None:
    """Products of TF32 would let engine and trainer disagree by 1e-3."""
    path, overrides = job(tmp_path / "job", target, dtype)
    rows = run(path, [*overrides, "trainer.total_training_steps=2"])
    worst = max(row["sync/canary_abs_diff"] for row in rows if "sync/canary_abs_diff" in row)
    print(f"RUN float32 canary {worst:.1e}")
    assert worst < 1e-4


LAYOUTS = {
    "tensor": ["actor.layout.tp=2", "actor.layout.sequence_parallel=true", "rollout.engines=2"],
    "pipeline": ["actor.layout.pp=2", "actor.layout.vpp=2", "rollout.engines=2"],
    "context": ["actor.layout.cp=2", "model.use_remove_padding=true", "rollout.engines=2"],
    "one engine of two ranks": [
        "actor.layout.dp=2",
        "rollout.engines=1",
        "rollout.tensor_parallel_size=2",
    ],
    "engine on a GPU of its own": ["rollout.placement=disaggregated"],
}


@pytest.mark.gpu2
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_two_gpus(layout: str, target: Target, tmp_path: Path) -> None:
    """Messages between GPUs, relays, pipelines and engines of two ranks.

    Engine and trainer agree after each sync.
    """
    path, overrides = job(tmp_path / "job", target, "bfloat16" if target.is_gpu else "float32")
    gpus = ["cluster.gpus_per_node=2"] if target.is_gpu else []
    overrides += ["trainer.total_training_steps=2", "actor.ppo_micro_batch_size_per_gpu=8"]
    rows = run(path, [*overrides, *gpus, *LAYOUTS[layout]])
    worst = max(row["sync/canary_abs_diff"] for row in rows if "sync/canary_abs_diff" in row)
    print(f"RUN {layout}: canary {worst:.1e}")
    assert worst < CANARY
