"""`rlhf3d rehearse`: a job in miniature, trained for two steps, saved, resumed and compared.

Invariant: the miniature runs by the same command as the job, in processes of its own; a rehearsal
passes only if both runs end well and the resumed one repeats the other's second step exactly (in
flight no run repeats a step). Where the first run of the same miniature was interrupted, it
continues from its checkpoint; else everything is made again.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf3d.checkpoints.resume import CHECKPOINTS, newest_complete
from rlhf3d.checkpoints.store import Store
from rlhf3d.config.keys import code_files
from rlhf3d.config.load import ConfigError, config_to_yaml
from rlhf3d.config.resolve import load_run
from rlhf3d.config.schema import Config
from rlhf3d.inputs import check_files, check_model, check_named
from rlhf3d.models.spec import parse_config
from rlhf3d.observability.metrics import METRICS_FILE, read_metrics
from rlhf3d.observability.samples import read_samples, samples_path
from rlhf3d.rehearsal.miniature import STAND_IN_ROWS, Shape, read_shape, write_model, write_prompts
from rlhf3d.rehearsal.shrink import STEPS, Shrunk, repeats, shrink_config
from rlhf3d.trainer.preemption import PREEMPTED, SIGNALS

NOT_COMPARED = ("timing_s/", "perf/", "sync/", "checkpoint/", "env/call_s/", "async/")
"""Metrics of seconds, bytes and memory."""


@dataclass(frozen=True)
class Miniature:
    """A miniature job on disk."""

    config: Path
    run: Path
    continues: bool
    """Whether an interrupted run of the same miniature is there, with a checkpoint."""
    notes: tuple[str, ...]
    """What differs from the job, besides size."""
    summary: str
    exact: bool
    """Whether its resumed run has to repeat a step to the bit."""


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

    `shape_folder` holds the model's config.json, where model.path is not here; `as_gpu` has it run
    under the rules of GPUs. Raises ValueError (ConfigError) for what is wrong with the job itself.
    """
    config = load_run(path, overrides)
    if as_gpu and config.cluster.ray_address is not None:
        raise ValueError(
            "--as-gpu rehearses on this machine alone: leave cluster.ray_address out, or --as-gpu"
        )
    shapes = _read_shapes(
        config.model.path, config.reward_model.path, path.parent / "models", shape_folder
    )
    # The job itself is judged first: its mistakes should not come as those of the miniature.
    _check_job(config, shapes)
    reward_shape = None if shapes.reward is None else shapes.reward.config
    shrunk = shrink_config(config, shapes.model.config, max_ranks, reward_shape, as_gpu)
    small, absent = _write_inputs(shrunk, shapes, folder)
    run = folder / "run"
    # `_train` overrides both; here they are the same every time, so that the job.yaml of
    # an interrupted rehearsal can be compared.
    small = replace(small, trainer=replace(small.trainer, output_dir=str(run), resume_mode="never"))
    job, text = folder / "job.yaml", config_to_yaml(small)
    continues = config.trainer.resume_mode == "auto" and _is_interrupted(job, run, text)
    # A run that was interrupted after its first step stays, with its checkpoint.
    for old in ("resumed",) if continues else ("run", "resumed"):
        shutil.rmtree(folder / old, ignore_errors=True)
    job.write_text(text, encoding="utf-8")
    # A mistake of shrinking is reported here, not by a worker.
    if problems := check_files(load_run(job)):
        raise ConfigError(problems)
    notes = [str(change) for change in shrunk.changes]
    notes += [f"{name}: not here; generated word problems stand in" for name in absent]
    batches = [
        f"{each.data.train_batch_size} prompts x {each.rollout.n}" for each in (small, config)
    ]
    summary = _summary(shapes.model.config, shrunk.model, " for ".join(batches))
    return Miniature(job, run, continues, tuple(notes), summary, repeats(small.rollout))


class _Shapes(NamedTuple):
    """The `config.json` of the job's models."""

    model: Shape
    reward: Shape | None


def _read_shapes(model: str, reward: str | None, shipped: Path, own: Path | None) -> _Shapes:
    """From the models' folders or those of the same names in `shipped`; the policy's from `own`."""
    folders = [Path(model), shipped / Path(model).name]
    shape = read_shape("model.path", folders if own is None else [own, *folders])
    if reward is None:
        return _Shapes(shape, None)
    folders = [Path(reward), shipped / Path(reward).name]
    return _Shapes(shape, read_shape("reward_model.path", folders))


def _check_job(config: Config, shapes: _Shapes) -> None:
    """Raise ConfigError for layouts that the models do not allow, and files that are missing."""
    reward_spec = None
    if shapes.reward is not None:
        reward_spec = parse_config(shapes.reward.config, str(config.reward_model.path))
    model_spec = parse_config(shapes.model.config, str(shapes.model.folder))
    problems = check_model(config, model_spec, reward_spec)
    problems += check_named(config.model.chat_template, code_files(config))
    if problems:
        raise ConfigError(problems)


def _write_inputs(shrunk: Shrunk, shapes: _Shapes, folder: Path) -> tuple[Config, list[str]]:
    """Models and prompts, the configuration that names them, and data files that are not here."""
    for old in ("model", "reward_model", "train", "val"):
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    config, seed = shrunk.config, shrunk.config.trainer.seed
    model, reward = folder / "model", folder / "reward_model"
    write_model(model, shrunk.model, shapes.model.folder, seed)
    config = replace(config, model=replace(config.model, path=str(model)))
    if shrunk.reward is not None:
        assert shapes.reward is not None
        # Other weights than the policy's.
        write_model(reward, shrunk.reward, shapes.reward.folder, seed + 1, classifier=True)
        config = replace(config, reward_model=replace(config.reward_model, path=str(reward)))
    rows = max(STAND_IN_ROWS, (STEPS + 1) * config.data.train_batch_size)
    train, absent = write_prompts(config.data.train_files, folder / "train", rows, seed)
    val, also_absent = write_prompts(config.data.val_files, folder / "val", rows, seed)
    data = replace(config.data, train_files=train, val_files=val)
    return replace(config, data=data), absent + also_absent


def _is_interrupted(job: Path, run: Path, text: str) -> bool:
    """Whether the same miniature has a complete checkpoint that is not its last."""
    if not job.is_file() or job.read_text(encoding="utf-8") != text:
        return False
    found, _ = newest_complete(Store(run / CHECKPOINTS))
    return found is not None and found.manifest.step < STEPS


def _summary(shape: Mapping[str, Any], small_shape: Mapping[str, Any], batches: str) -> str:
    sizes = "{num_hidden_layers} layers x {hidden_size}"
    return (
        f"{shape['model_type']} of {sizes.format_map(small_shape)} for {sizes.format_map(shape)}, "
        f"a step of {batches}"
    )


def rehearse(miniature: Miniature, say: Callable[[str], None]) -> None:
    """Train the miniature, resume it from its first step, and compare. Raises RehearsalFailed."""
    _train(miniature, miniature.run, "auto" if miniature.continues else "never", say)
    again = miniature.run.with_name("resumed")
    # From the checkpoint before the last step: the resumed run repeats that step alone.
    _train(miniature, again, str(miniature.run / "checkpoints" / f"step_{STEPS - 1}"), say)
    steps = [row["step"] for row in read_metrics(again)]
    if steps != [STEPS]:
        raise RehearsalFailed(
            f"the resumed run has steps {steps}, not {STEPS} alone: it did not resume"
        )
    differing = differences(miniature.run, again, STEPS)
    if differing and miniature.exact:
        raise RehearsalFailed(
            f"step {STEPS} of the resumed run is not that of the first: {'; '.join(differing[:5])}"
        )


def _train(miniature: Miniature, output: Path, resume: str, say: Callable[[str], None]) -> None:
    chosen = [f"trainer.output_dir={output}", f"trainer.resume_mode={resume}"]
    command = [sys.executable, "-m", "rlhf3d.cli", "train", str(miniature.config), *chosen]
    say(f"rlhf3d train {miniature.config} {' '.join(chosen)}")
    with subprocess.Popen(command) as child:
        # A job script signals this process alone; the run has to save and end.
        for number in SIGNALS:
            # They stay when the child has ended, which send_signal takes as nothing to do.
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
    """Return what differs between two runs in a step.

    Metrics but of time and memory, completions.
    """
    first, second = _comparable(run, step), _comparable(other, step)
    for folder, row in ((run, first), (other, second)):
        if row is None:
            return [f"{folder} has no step {step}"]
    assert first is not None and second is not None
    problems = [f"{name} is in one of them only" for name in sorted(first.keys() ^ second.keys())]
    for name in sorted(first.keys() & second.keys()):
        if json.dumps(first[name]) != json.dumps(second[name]):  # as text NaN equals itself
            problems.append(f"{name} {first[name]} and {second[name]}")
    if read_samples(samples_path(run, step)) != read_samples(samples_path(other, step)):
        problems.append("the completions")
    return problems


def _comparable(run: Path, step: int) -> dict[str, Any] | None:
    """The metrics of a step that two equal runs share; None where it has no such step."""
    for row in read_metrics(run):
        if row["step"] == step:
            return {name: row[name] for name in row if not name.startswith(NOT_COMPARED)}
    return None
