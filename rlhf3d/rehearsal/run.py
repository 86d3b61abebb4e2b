"""`rlhf3d rehearse`: a job in miniature, trained for two steps, saved, resumed and compared.

Invariant: the miniature runs by the same command as the job, in processes of its own; a rehearsal passes only if both
runs end well and the resumed one repeats the other's second step exactly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf3d.config.checks import check_model
from rlhf3d.config.load import ConfigError, config_to_yaml, load_config
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import parse_config
from rlhf3d.observability.metrics import METRICS_FILE, read_metrics
from rlhf3d.observability.samples import read_samples
from rlhf3d.rehearsal.miniature import STAND_IN_ROWS, read_shape, write_model, write_prompts
from rlhf3d.rehearsal.shrink import STEPS, shrink_config

NOT_COMPARED = ("timing_s/", "perf/", "sync/", "checkpoint/")
"""Metrics of seconds, bytes and memory."""


@dataclass(frozen=True)
class Miniature:
    """A miniature job on disk."""

    config: Path
    run: Path
    notes: tuple[str, ...]
    """What is otherwise than in the job, besides size."""
    summary: str


class RehearsalFailed(RuntimeError):
    """The miniature did not run, or not twice the same."""


def prepare(
    path: Path, overrides: Sequence[str], folder: Path, max_ranks: int, shape_folder: Path | None = None
) -> Miniature:
    """Write the miniature of a job into `folder`.

    `shape_folder` holds the model's config.json, where model.path is not here. Raises ValueError (ConfigError) for what
    is wrong with the job itself.
    """
    config = load_config(path, overrides, files=False)
    if config.reward_model.path is not None:
        raise ValueError(
            "reward_model.path: a miniature has no reward model; rehearse the rest with reward_model.path=null "
            "reward.weights='{accuracy: 1.0}'"
        )
    shapes = [*([shape_folder] if shape_folder else []), Path(config.model.path)]
    shapes.append(path.parent / "models" / Path(config.model.path).name)
    original = next((found for found in shapes if (found / "config.json").is_file()), shapes[0])
    shape = read_shape(original)
    problems = check_model(config, parse_config(shape, str(original)))
    for key, file in (
        ("custom_reward_function.path", config.custom_reward_function.path),
        ("algorithm.custom_path", config.algorithm.custom_path),
        ("data.curriculum.path", config.data.curriculum.path),
    ):
        if file is not None and not Path(file).is_file():
            problems.append(f"{key} = {file}: no such Python file")
    if problems:
        raise ConfigError(problems)
    small, small_shape, changes = shrink_config(config, shape, max_ranks)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", small_shape, original, config.trainer.seed)
    small, absent = _with_prompts(small, folder)
    small = replace(
        small,
        model=replace(small.model, path=str(folder / "model")),
        trainer=replace(small.trainer, output_dir=str(folder / "run"), resume_mode="never"),
    )
    job = folder / "job.yaml"
    job.write_text(config_to_yaml(small))
    load_config(job)  # what shrinking got wrong is told here, and not by a worker
    notes = [str(change) for change in changes]
    notes += [f"{name}: not here; generated word problems stand in" for name in absent]
    layers, width = small_shape["num_hidden_layers"], small_shape["hidden_size"]
    summary = (
        f"{shape['model_type']} of {layers} layers x {width} for {shape['num_hidden_layers']} x {shape['hidden_size']}"
        f", a step of {small.data.train_batch_size} prompts x {small.rollout.n} for {config.data.train_batch_size} x "
        f"{config.rollout.n}"
    )
    return Miniature(job, folder / "run", tuple(notes), summary)


def _with_prompts(config: Config, folder: Path) -> tuple[Config, list[str]]:
    rows = max(STAND_IN_ROWS, (STEPS + 1) * config.data.train_batch_size)
    data, seed = config.data, config.trainer.seed
    train, absent = write_prompts(data.train_files, folder / "train", rows, seed)
    val, also = write_prompts(data.val_files, folder / "val", rows, seed)
    return replace(config, data=replace(data, train_files=train, val_files=val)), absent + also


def rehearse(miniature: Miniature, say: Callable[[str], None]) -> None:
    """Train the miniature, resume it from its first step, and compare. Raises RehearsalFailed."""
    _train(miniature, miniature.run, "never", say)
    again = miniature.run.with_name("resumed")
    _train(miniature, again, str(miniature.run / "checkpoints" / f"step_{STEPS - 1}"), say)
    steps = [row["step"] for row in read_metrics(again)]
    if steps != [STEPS]:
        raise RehearsalFailed(f"the resumed run has steps {steps}, not {STEPS} alone: it did not resume")
    differing = differences(miniature.run, again, STEPS)
    if differing:
        raise RehearsalFailed(f"step {STEPS} of the resumed run is not that of the first: {'; '.join(differing[:5])}")


def _train(miniature: Miniature, output: Path, resume: str, say: Callable[[str], None]) -> None:
    chosen = [f"trainer.output_dir={output}", f"trainer.resume_mode={resume}"]
    command = [sys.executable, "-m", "rlhf3d.cli", "train", str(miniature.config), *chosen]
    say(f"rlhf3d train {miniature.config} {' '.join(chosen)}")
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RehearsalFailed(
            f"the miniature ended with exit code {done.returncode}; its logs are in {output / 'logs'}"
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
        rows.append({name: value for name, value in found[-1].items() if not name.startswith(NOT_COMPARED)})
    first, second = rows
    found_in_one = [f"{name} is in one of them only" for name in sorted(first.keys() ^ second.keys())]
    unlike = [
        f"{name} {first[name]} and {second[name]}"
        for name in first.keys() & second.keys()
        if json.dumps(first[name]) != json.dumps(second[name])  # as text NaN equals itself
    ]
    samples = [read_samples(folder / "samples" / f"step_{step}.jsonl") for folder in (run, other)]
    return found_in_one + sorted(unlike) + (["the completions"] if samples[0] != samples[1] else [])
