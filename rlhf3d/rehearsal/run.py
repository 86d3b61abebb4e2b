"""`rlhf3d rehearse`: a job in miniature, trained for two steps, saved, resumed and compared.

Invariant: the miniature runs by the same command as the job, in processes of its own; a rehearsal passes only if both
runs end well and the resumed one repeats the other's second step exactly. Where the first run of the same miniature was
interrupted, it goes on from its checkpoint; else everything is made anew.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.resume import CHECKPOINTS, newest_whole
from rlhf3d.checkpoints.store import Store
from rlhf3d.config.load import ConfigError, config_to_yaml
from rlhf3d.config.resolve import load_run
from rlhf3d.config.schema import Config
from rlhf3d.inputs import check_files, check_model
from rlhf3d.models.spec import parse_config
from rlhf3d.observability.metrics import METRICS_FILE, read_metrics
from rlhf3d.observability.samples import read_samples
from rlhf3d.rehearsal.miniature import STAND_IN_ROWS, read_shape, write_model, write_prompts
from rlhf3d.rehearsal.shrink import STEPS, shrink_config
from rlhf3d.trainer.stopping import PREEMPTED, SIGNALS

NOT_COMPARED = ("timing_s/", "perf/", "sync/", "checkpoint/")
"""Metrics of seconds, bytes and memory."""


@dataclass(frozen=True)
class Miniature:
    """A miniature job on disk."""

    config: Path
    run: Path
    goes_on: bool
    """Whether an interrupted run of the same miniature is there, with a checkpoint."""
    notes: tuple[str, ...]
    """What is otherwise than in the job, besides size."""
    summary: str


class RehearsalFailed(RuntimeError):
    """The miniature did not run, or not twice the same."""


def prepare(
    path: Path,
    overrides: Sequence[str],
    folder: Path,
    max_ranks: int,
    shape_folder: Path | None = None,
    as_gpu: bool = False,
) -> Miniature:
    """Write the miniature of a job into `folder`.

    `shape_folder` holds the model's config.json, where model.path is not here; `as_gpu` has it run under the rules of
    GPUs. Raises ValueError (ConfigError) for what is wrong with the job itself.
    """
    config = load_run(path, overrides)
    if as_gpu and config.cluster.ray_address is not None:
        raise ValueError(
            "--as-gpu rehearses on this machine alone: leave cluster.ray_address out, or --as-gpu"
        )

    def beside(model: str) -> list[Path]:
        return [Path(model), path.parent / "models" / Path(model).name]

    own = [shape_folder] if shape_folder else []
    original, shape = read_shape("model.path", [*own, *beside(config.model.path)])
    judge, reward_shape, reward_spec = config.reward_model.path, None, None
    if judge is not None:
        judge_original, reward_shape = read_shape("reward_model.path", beside(judge))
        reward_spec = parse_config(reward_shape, judge)
    problems = check_model(config, parse_config(shape, str(original)), reward_spec)
    for key, file in (
        ("custom_reward_function.path", config.custom_reward_function.path),
        ("algorithm.custom_path", config.algorithm.custom_path),
        ("data.curriculum.path", config.data.curriculum.path),
    ):
        if file is not None and not Path(file).is_file():
            problems.append(f"{key} = {file}: no such Python file")
    if problems:
        raise ConfigError(problems)
    shrunk, seed = (
        shrink_config(config, shape, max_ranks, reward_shape, as_gpu),
        config.trainer.seed,
    )
    for old in ("model", "reward_model", "train", "val"):
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", shrunk.model, original, seed)
    small, absent = _with_prompts(shrunk.config, folder)
    if shrunk.reward is not None:
        write_model(
            folder / "reward_model", shrunk.reward, judge_original, seed + 1, classifier=True
        )
        small = replace(
            small, reward_model=replace(small.reward_model, path=str(folder / "reward_model"))
        )
    small = replace(
        small,
        model=replace(small.model, path=str(folder / "model")),
        trainer=replace(small.trainer, output_dir=str(folder / "run"), resume_mode="never"),
    )
    job, run, text = folder / "job.yaml", folder / "run", config_to_yaml(small)
    same = (
        config.trainer.resume_mode == "auto"
        and job.is_file()
        and job.read_text(encoding="utf-8") == text
    )
    goes_on = same and _interrupted(run)
    for old in ("resumed",) if goes_on else ("run", "resumed"):
        shutil.rmtree(folder / old, ignore_errors=True)
    job.write_text(text, encoding="utf-8")
    # What shrinking got wrong is reported here, not by a worker.
    if problems := check_files(load_run(job)):
        raise ConfigError(problems)
    notes = [str(change) for change in shrunk.changes]
    notes += [f"{name}: not here; generated word problems stand in" for name in absent]
    layers, width = shrunk.model["num_hidden_layers"], shrunk.model["hidden_size"]
    summary = (
        f"{shape['model_type']} of {layers} layers x {width} for {shape['num_hidden_layers']} x {shape['hidden_size']}"
        f", a step of {small.data.train_batch_size} prompts x {small.rollout.n} for {config.data.train_batch_size} x "
        f"{config.rollout.n}"
    )
    return Miniature(job, run, goes_on, tuple(notes), summary)


def _interrupted(run: Path) -> bool:
    """Whether a run has a whole checkpoint, and it is not the last."""
    found, _ = newest_whole(Store(run / CHECKPOINTS))
    return found is not None and found.manifest.step < STEPS


def _with_prompts(config: Config, folder: Path) -> tuple[Config, list[str]]:
    rows = max(STAND_IN_ROWS, (STEPS + 1) * config.data.train_batch_size)
    data, seed = config.data, config.trainer.seed
    train, absent = write_prompts(data.train_files, folder / "train", rows, seed)
    val, also = write_prompts(data.val_files, folder / "val", rows, seed)
    return replace(config, data=replace(data, train_files=train, val_files=val)), absent + also


def rehearse(miniature: Miniature, say: Callable[[str], None]) -> None:
    """Train the miniature, resume it from its first step, and compare. Raises RehearsalFailed."""
    _train(miniature, miniature.run, "auto" if miniature.goes_on else "never", say)
    again = miniature.run.with_name("resumed")
    _train(miniature, again, str(miniature.run / "checkpoints" / f"step_{STEPS - 1}"), say)
    steps = [row["step"] for row in read_metrics(again)]
    if steps != [STEPS]:
        raise RehearsalFailed(
            f"the resumed run has steps {steps}, not {STEPS} alone: it did not resume"
        )
    differing = differences(miniature.run, again, STEPS)
    if differing:
        raise RehearsalFailed(
            f"step {STEPS} of the resumed run is not that of the first: {'; '.join(differing[:5])}"
        )


def _train(miniature: Miniature, output: Path, resume: str, say: Callable[[str], None]) -> None:
    chosen = [f"trainer.output_dir={output}", f"trainer.resume_mode={resume}"]
    command = [sys.executable, "-m", "rlhf3d.cli", "train", str(miniature.config), *chosen]
    say(f"rlhf3d train {miniature.config} {' '.join(chosen)}")
    with subprocess.Popen(command) as child:
        for number in SIGNALS:  # it saves and ends; a job script knows this process alone
            signal.signal(number, lambda number, frame: child.send_signal(number))
        code = child.wait()
    if code == PREEMPTED:
        raise SystemExit(PREEMPTED)
    if code:
        raise RehearsalFailed(
            f"the miniature ended with exit code {code}; its logs are in {output / 'logs'}"
        )
    if not (output / METRICS_FILE).is_file():
        raise RehearsalFailed(f"the miniature wrote no {output / METRICS_FILE}")


def differences(run: Path, other: Path, step: int) -> list[str]:
    """What differs between two runs in a step: metrics that are no seconds or bytes, and completions."""
    rows: list[dict[str, Any]] = []
    for folder in (run, other):
        found = [row for row in read_metrics(folder) if row["step"] == step]
        if not found:
            return [f"{folder} has no step {step}"]
        rows.append(
            {name: value for name, value in found[-1].items() if not name.startswith(NOT_COMPARED)}
        )
    first, second = rows
    found_in_one = [
        f"{name} is in one of them only" for name in sorted(first.keys() ^ second.keys())
    ]
    unlike = [
        f"{name} {first[name]} and {second[name]}"
        for name in first.keys() & second.keys()
        if json.dumps(first[name]) != json.dumps(second[name])  # as text NaN equals itself
    ]
    samples = [read_samples(folder / "samples" / f"step_{step}.jsonl") for folder in (run, other)]
    return found_in_one + sorted(unlike) + (["the completions"] if samples[0] != samples[1] else [])
