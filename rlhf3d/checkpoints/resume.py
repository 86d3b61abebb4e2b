"""Where a run starts: in a new folder, or from a complete checkpoint that fits the configuration.

Invariant: a run never resumes from an incomplete checkpoint. A change with which it could not
continue exactly is refused or reported.

Runs in: driver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import yaml

from rlhf3d.checkpoints.identity import code_identity, model_identity
from rlhf3d.checkpoints.manifest import MANIFEST, Manifest, problems, read_manifest
from rlhf3d.checkpoints.store import CONFIG_FILE, DRIVER_FILE, EXPERIENCE_FOLDER, Store
from rlhf3d.config.groups import TRAINABLE, worker_groups
from rlhf3d.config.keys import code_files
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import Config, TrainerConfig
from rlhf3d.models.spec import ModelSpec
from rlhf3d.observability.metrics import METRICS_FILE, read_metrics

CHECKPOINTS = "checkpoints"
# They say where a run is and what it starts from, not what it computes.
_UNREPORTED = ("trainer.output_dir", "trainer.resume_mode")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint to resume from."""

    folder: Path
    manifest: Manifest
    state: dict[str, Any]
    """The driver's, from driver.json."""
    config: dict[str, Any]
    """As the run had it, by dotted key."""

    @property
    def run(self) -> Path:
        """Folder of the run that wrote it."""
        return self.folder.resolve().parent.parent


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    folder: Path
    """Where it writes."""
    checkpoint: Checkpoint | None
    notes: list[str]
    """What the user should know, one line each."""
    finished: Path | None = None
    """The run that this configuration has finished already: there is nothing to do."""


def choose_start(config: Config, total_steps: int) -> Start:
    """What trainer.resume_mode asks for; ValueError if a given checkpoint is not complete."""
    trainer = config.trainer
    mode, output_dir = trainer.resume_mode, trainer.output_dir
    if mode == "never":
        return Start(_fresh_folder(output_dir), None, [])
    if mode != "auto":
        return _start_from(output_dir, Path(mode))
    run = _newest_run(output_dir)
    if run is None:
        return Start(_fresh_folder(output_dir), None, [])
    # Also for a finished run: its last checkpoint decides whether it is finished.
    found, notes = newest_complete(Store(run / CHECKPOINTS))
    if _finished(run, found.manifest.step if found else 0, total_steps, trainer.save_at_end):
        # The same command again has nothing to do; another configuration means a new run.
        now = flat_config(config)
        same = (run / CONFIG_FILE).is_file() and not _changes(_read_config(run), now)
        note = f"{run} is finished, with another configuration: a new run in a folder next to it"
        return Start(_fresh_folder(output_dir), None, [*notes, note], run if same else None)
    if found is None:
        note = f"{run} has no complete checkpoint: a new run in a folder next to it"
        return Start(_fresh_folder(output_dir), None, [*notes, note])
    return Start(run, found, notes)


def began_at(trainer: TrainerConfig) -> datetime | None:
    """The time that chat templates were told in the run that this one may resume.

    Known before `choose_start`, which has to know how many prompts there are: their dates may
    decide which are too long. None: a new run, or one of a version that did not keep it.
    """
    mode = trainer.resume_mode
    run = _newest_run(trainer.output_dir) if mode == "auto" else Path(mode)
    if run is None or mode == "never":
        return None
    if (run / MANIFEST).is_file():  # a checkpoint
        return _began(run)
    store = Store(run / CHECKPOINTS)
    # All of a run's have the same; which of them is complete is found later.
    times = (_began(store.path(step)) for step in reversed(store.steps()))
    return next((time for time in times if time is not None), None)


def _began(folder: Path) -> datetime | None:
    """Of a checkpoint; None where its driver.json lacks it or is damaged, which is told later."""
    try:
        return datetime.fromisoformat(json.loads((folder / DRIVER_FILE).read_text())["began"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_from(output_dir: str, path: Path) -> Start:
    """From a checkpoint or a run's newest; in its run's folder where that is trainer.output_dir."""
    if (path / MANIFEST).is_file():
        # A checkpoint that is named is meant: where it is damaged, no earlier one takes its place.
        found: Checkpoint | None = _read(path)
        notes: list[str] = []
        if wrong := problems(path, read_manifest(path)):
            raise ValueError(
                f"trainer.resume_mode = {path}: {_listed(wrong)}; "
                "copy it again or resume an earlier one"
            )
    else:
        found, notes = newest_complete(Store(path / CHECKPOINTS))
    if found is None:
        raise ValueError(
            f"trainer.resume_mode = {path}: not a checkpoint (it has no {MANIFEST}), and not a run "
            "folder with a complete checkpoint; give auto, never or a path"
            + "".join(f"\n{note}" for note in notes)
        )
    # A checkpoint of this run continues in its folder; that of another starts a new one.
    own = (folder for folder in _run_folders(output_dir) if folder.resolve() == found.run)
    return Start(next(own, None) or _fresh_folder(output_dir), found, notes)


def newest_complete(store: Store) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file is as written; a line on each newer one."""
    notes: list[str] = []
    # Every file is read; the first good one ends the search.
    for step in reversed(store.steps()):
        try:
            wrong = problems(store.path(step), read_manifest(store.path(step)))
        except ValueError as error:
            wrong = [str(error)]
        if not wrong:
            return _read(store.path(step)), notes
        notes.append(f"checkpoint {store.path(step)} is not used: {_listed(wrong)}")
    return None, notes


def _listed(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} files more" if len(wrong) > 3 else "")


def _read(folder: Path) -> Checkpoint:
    if absent := [name for name in (DRIVER_FILE, CONFIG_FILE) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no {' and no '.join(absent)}: it holds a model (converted, for "
            "example), not the state of a run; set model.path to its Hugging Face folder to train "
            "on from it"
        )
    state = json.loads((folder / DRIVER_FILE).read_text())
    return Checkpoint(folder, read_manifest(folder), state, _read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration in a run's folder or a checkpoint's, by dotted key."""
    return dict(_flat(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))))


def flat_config(config: Config) -> dict[str, Any]:
    """Every key's value, as a file would have it, by dotted key."""
    return dict(_flat(yaml.safe_load(config_to_yaml(config))))


def set_aside(store: Store, step: int) -> list[str]:
    """Rename checkpoints later than `step`, which the run writes again; return the new names."""
    moved = []
    for later in (s for s in store.steps() if s > step):
        path = store.path(later)
        names = (path.with_name(f"{path.name}.aside{'' if i == 1 else f'-{i}'}") for i in count(1))
        # A run may be resumed from the same early step again: older ones set aside stay.
        free = next(name for name in names if not name.exists())
        # `Store.steps` takes step_N alone, so this hides it from resume and keep.
        path.rename(free)
        moved.append(free.name)
    return moved


def check_resume(found: Checkpoint, config: Config, spec: ModelSpec) -> list[str]:
    """Return a line per key that has changed. ValueError lists what would make the run wrong."""
    refused = []
    saved, manifest = found.state["model"], found.manifest
    # Through JSON, as the saved one went: tuples become lists.
    now = json.loads(json.dumps(asdict(spec)))
    if shapes := [
        f"{key} {saved['spec'].get(key)} -> {now[key]}"
        for key in now
        if saved["spec"].get(key) != now[key]
    ]:
        refused.append(
            f"model.path = {config.model.path} is a model of another shape ({', '.join(shapes)})"
        )
    elif saved["identity"] != model_identity(config.model.path):
        refused.append(
            f"model.path = {config.model.path} holds other weights than this run began with, "
            "from which the reference and the companion files come"
        )
    dtype = found.config["model.dtype"]
    if dtype != config.model.dtype:
        refused.append(
            f"model.dtype = {config.model.dtype}, the checkpoint's is {dtype}: "
            f"set model.dtype={dtype}"
        )
    kl = found.config["algorithm.kl_ctrl.type"]
    if kl != (kl_now := config.algorithm.kl_ctrl.type):
        refused.append(
            f"algorithm.kl_ctrl.type = {kl_now}, the checkpoint holds the state of a "
            f"{kl} controller"
        )
    flat = flat_config(config)
    refused += _stale_ahead(found, flat)
    # Only models that learn have a checkpoint; reference and reward model start from model.path.
    roles = chain.from_iterable(group.roles for group in worker_groups(config))
    wanted = [role for role in roles if role in TRAINABLE]
    if missing := [role for role in wanted if role not in manifest.models]:
        before = found.config["algorithm.adv_estimator"]
        refused.append(
            f"algorithm.adv_estimator = {config.algorithm.adv_estimator} trains a "
            f"{', '.join(missing)}, which the checkpoint does not hold (it was {before})"
        )
    if not manifest.optimizer and not config.trainer.resume_fresh_optimizer:
        refused.append(
            "it holds no optimizer state (trainer.save_optimizer was false), so the run cannot "
            "continue as it was: trainer.resume_fresh_optimizer=true continues with fresh "
            "optimizers"
        )
    if refused:
        raise ValueError(
            f"cannot resume from {found.folder}:\n"
            + "".join(f"  {reason}\n" for reason in refused)
            + "trainer.resume_mode=never starts a new run"
        )
    code = code_identity(code_files(config))
    return [*_changes(found.config, flat), *_changed_code(found, flat, code)]


def _stale_ahead(found: Checkpoint, now: dict[str, Any]) -> Iterator[str]:
    """Whether what was generated ahead, and is in the checkpoint, still has a place in the run."""
    # Checkpoints of earlier versions are of runs that generated nothing ahead.
    ahead = found.config.get("rollout.max_staleness", 0)
    update = found.config.get("rollout.update", "between_batches")
    waiting = (found.folder / EXPERIENCE_FOLDER).is_dir()
    # In flight a position in the data is one of groups: it depends on a step's number of them.
    if not ahead or (update == "between_batches" and not waiting):
        return
    if (staleness := now["rollout.max_staleness"]) < ahead and waiting:
        yield (
            f"rollout.max_staleness = {staleness}: the checkpoint holds completions that were "
            f"generated up to {ahead} batch(es) ahead, which would be too old; set {ahead} or more"
        )
    if now["rollout.update"] != update:
        yield (
            f"rollout.update = {now['rollout.update']}: the checkpoint holds completions that were "
            f"generated ahead with {update}; set rollout.update={update}"
        )
    # What was generated ahead is drawn and grouped already, with greedy answers or without.
    for key in ("data.train_batch_size", "rollout.n", "algorithm.adv_estimator"):
        before = found.config[key]
        if before != now[key]:
            yield (
                f"{key} = {now[key]}: the checkpoint holds completions that were generated ahead "
                f"with {before}; set {key}={before}"
            )


def _changed_code(found: Checkpoint, now: dict[str, Any], code: dict[str, str]) -> Iterator[str]:
    """One line per Python file of the user's that now has other text, under the same name."""
    # Checkpoints of earlier versions have no digests.
    for key, before in found.state.get("code", {}).items():
        if code.get(key, before) != before and found.config.get(key) == now.get(key):
            yield f"{key}: the text of {now[key]}"


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per key that has changed since a run's configuration."""
    keys = [key for key in sorted({*now, *before}) if key not in _UNREPORTED]
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _finished(run: Path, step: int, total_steps: int, save_at_end: bool) -> bool:
    rows = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    # Metrics go on after the last save: `done` may be ahead of the newest checkpoint.
    done = max((row["step"] for row in rows), default=0)
    return done >= total_steps and (step >= total_steps or not save_at_end)


def _newest_run(output_dir: str) -> Path | None:
    # Folders are in the order of their numbers: the last is the newest run.
    return next(reversed([path for path in _run_folders(output_dir) if _is_run(path)]), None)


def _run_folders(output_dir: str) -> Iterator[Path]:
    """trainer.output_dir and the folders next to it that later runs took."""
    # The first name that is not there ends the series.
    return takewhile(Path.is_dir, _names(output_dir))


def _names(output_dir: str) -> Iterator[Path]:
    """trainer.output_dir, and that with -2, -3, … added to its name."""
    return map(Path, chain([output_dir], (f"{output_dir}-{i}" for i in count(2))))


def _is_run(path: Path) -> bool:
    return (path / METRICS_FILE).exists() or bool(Store(path / CHECKPOINTS).steps())


def _fresh_folder(output_dir: str) -> Path:
    """The first of those names that no run has written to."""
    return next(path for path in _names(output_dir) if not _is_run(path))
