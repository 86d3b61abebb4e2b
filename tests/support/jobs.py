"""A tiny job for the whole command, run as a user would.

Invariant: every process of a run inherits `MARK`, so that a test knows its own processes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from support.tiny_models import make_tiny_model

from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.observability.metrics import read_metrics
from rlhf3d.resharding.setup import FILE_PREFIX

STEPS = 24
MARK = "RLHF3D_TEST_RUN"
MARKED = {**os.environ, MARK: str(os.getpid())}
REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The share of lower-case letters among the characters."""
    return sum(c.islower() for c in solution_str) / max(len(solution_str), 1)
'''
OWN_ALGORITHM = '''
from rlhf3d.algorithms.advantages import register_advantage
from rlhf3d.algorithms.losses import PolicyLossTerms, register_policy_loss


@register_advantage("centered")
def centered(inputs):
    """Score less the mean score of the batch, on every token."""
    scores = inputs.token_level_rewards.sum(-1, keepdim=True)
    advantages = inputs.custom["scale"] * (scores - scores.mean()).expand_as(inputs.response_mask)
    return advantages, advantages


@register_policy_loss("squared_clip")
def squared_clip(logprobs, old_logprobs, advantages, response_mask, settings):
    """Plain policy gradient, with a squared penalty instead of a clip."""
    log_ratio = logprobs - old_logprobs
    loss = -advantages * log_ratio.exp() + settings.custom["penalty"] * log_ratio.square()
    return PolicyLossTerms(loss, {"ppo_kl": -log_ratio})
'''


def own_algorithm(folder: Path) -> dict[str, Any]:
    """The section `algorithm` of a job with OWN_ALGORITHM, which is written."""
    (folder / "own.py").write_text(OWN_ALGORITHM)
    own = {"adv_estimator": "centered", "custom_path": str(folder / "own.py")}
    return own | {"custom_kwargs": {"scale": 3.0, "penalty": 0.5}}


def write_job(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny PPO job: model, prompts, reward function and configuration."""
    make_tiny_model(
        folder / "model",
        family,
        tie=family == "llama",
        layers=4,
        hidden=64,
        heads=2,
        kv_heads=2,
        ffn=128,
    )
    rows = [
        PromptRow(
            "tiny",
            [{"role": "user", "content": f"word {i}"}],
            "letters",
            {"ground_truth": "", "style": "rule"},
        )
        for i in range(64)
    ]
    write_parquet(rows, folder / "prompts.parquet", {})
    (folder / "reward.py").write_text(REWARD)
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train_files": [str(folder / "prompts.parquet")],
            "val_files": [str(folder / "prompts.parquet")],
            "val_max_samples": 16,
            "train_batch_size": 64,
            "max_prompt_length": 48,
            "max_response_length": 4,
        },
        "actor": {
            "optim": {"lr": 3.0e-3, "weight_decay": 0.0},
            "ppo_mini_batch_size": 32,
            "ppo_micro_batch_size_per_gpu": 32,
        },
        "critic": {"optim": {"lr": 3.0e-3, "weight_decay": 0.0}},
        "rollout": {"dtype": "float32", "kv_cache_gib": 0.1, "threads": 1, "n": 1},
        "algorithm": {"use_kl_in_reward": True},
        "custom_reward_function": {"path": str(folder / "reward.py")},
        "trainer": {
            "total_training_steps": STEPS,
            "output_dir": str(folder / "run"),
            "test_freq": 0,
        },
        "cluster": {"platform": "cpu"},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command_line(job: Path, *overrides: str) -> list[str]:
    """The command that trains a job."""
    return [str(Path(sys.executable).with_name("rlhf3d")), "train", str(job), *overrides]


def train(job: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    return _run(command_line(job, *overrides), MARKED)


def train_with_deaths(job: Path, moments: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command while engine processes are killed; see `kills.py` for `moments`."""
    return _run(*_with_deaths(job, moments, *overrides))


def _with_deaths(job: Path, moments: str, *overrides: str) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    command = [sys.executable, "-m", "support.kills", moments, "train", str(job), *overrides]
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return command, MARKED | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def stop_at(
    job: Path,
    step: int,
    act: Callable[[subprocess.Popen[str]], None],
    *overrides: str,
    moments: str | None = None,
) -> tuple[int, str]:
    """Train until the line of a step is printed, and act on the process.

    `moments`: of deaths on the way. Returns its exit code and what it printed.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command, environment = command_line(job, *overrides), MARKED
    if moments is not None:
        command, environment = _with_deaths(job, moments, *overrides)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if re.match(rf"step +{step}/", line):
                act(process)
                break
        rest = process.stdout.read()
        return process.wait(timeout=60), "".join(printed) + rest


def own_processes() -> list[psutil.Process]:
    """Processes that inherited these tests' mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == MARKED[MARK]:
                found.append(process)
    return found


def signal_everyone(number: int) -> None:
    """Send a signal to every process of the run, as service managers do."""
    for process in own_processes():
        with suppress(psutil.Error):
            process.send_signal(number)


def left_behind(within_s: float = 30.0) -> set[str]:
    """Own processes, and shared files of runs whose driver has gone, that stay.

    What was killed with a run needs a moment to end.
    """
    until = time.monotonic() + within_s
    while (found := _left_now()) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def _left_now() -> set[str]:
    found = set()
    for process in own_processes():
        with suppress(psutil.Error):
            found.add(f"{process.name()} {process.pid}")
    for path in Path("/dev/shm").glob(f"{FILE_PREFIX}*"):
        driver = path.name.removeprefix(FILE_PREFIX).split("-")[0]
        if driver.isdigit() and not psutil.pid_exists(int(driver)):
            found.add(path.name)
    return found


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints, ascending."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The metrics, a row for each step; not one that a kill left unfinished."""
    return read_metrics(run)


def sample_rows(run: Path, step: int) -> list[dict[str, Any]]:
    """The samples of a training step."""
    lines = (run / "samples" / f"step_{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
