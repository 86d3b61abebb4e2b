"""The folder of a run, made ready for what it continues from, and that loaded.

Invariant: a resumed run's folder reads as if the run had never stopped: what was written after the
checkpoint goes, and each step has its row once.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.manifest import LIBRARIES, versions
from rlhf3d.checkpoints.resume import (
    CHECKPOINTS,
    Checkpoint,
    Start,
    check_resume,
    set_aside,
)
from rlhf3d.checkpoints.store import Store
from rlhf3d.config.schema import Config, TrainerConfig
from rlhf3d.machine import package_versions
from rlhf3d.models.spec import ModelSpec
from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.samples import drop_samples
from rlhf3d.observability.trackers.protocol import RunFacts
from rlhf3d.observability.trackers.registry import open_trackers
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.trainer.components import RunComponents


def prepare_folder(start: Start, config: Config, spec: ModelSpec) -> list[str]:
    """Clean the run's folder; lines for the user. ValueError where the checkpoint does not fit."""
    output, checkpoint = start.folder, start.checkpoint
    notes = list(start.notes)
    if checkpoint is not None:
        # Before anything is removed, as it may refuse.
        changes = check_resume(checkpoint, config, spec)
        notes.append(f"resume from step {checkpoint.manifest.step}: {checkpoint.folder}")
        notes += [f"changed {change}" for change in changes]
    store = Store(output / CHECKPOINTS)
    if left := store.clean():
        notes.append(f"removed what a killed run left of {', '.join(left)}")
    # Only in the run's own folder: a new run from it leaves the old one as it is.
    if checkpoint is not None and checkpoint.run == output.resolve():
        step = checkpoint.manifest.step
        if moved := set_aside(store, step):
            notes.append(f"later checkpoints are now named {', '.join(moved)}")
        drop_samples(output, step)
    return notes


def open_metrics(
    trainer: TrainerConfig,
    flat: dict[str, Any],
    checkpoint: Checkpoint | None,
    warn: Callable[[str], None],
) -> MetricsWriter:
    """The writer of the run's metrics and its trackers, without the rows after the checkpoint.

    A run that was killed between a checkpoint and the row of its step gets that row here. `flat`:
    the complete configuration; `warn` takes what the user should know of trackers.
    """
    output = Path(trainer.output_dir)
    step = None if checkpoint is None else checkpoint.manifest.step
    facts = RunFacts(
        folder=output,
        project=trainer.project_name,
        name=trainer.experiment_name or output.resolve().name,
        config=flat,
        versions=versions(),
        resume_step=step,
    )
    trackers = open_trackers(trainer.logger, facts, trainer.logger_samples, warn)
    writer = MetricsWriter(output, resume_step=step, trackers=trackers)
    if checkpoint is None or checkpoint.run != output.resolve():
        return writer
    if writer.last_step < checkpoint.manifest.step:
        writer.write(checkpoint.manifest.step, checkpoint.state["metrics"])
    return writer


def open_journal(
    output: Path, identity: dict[str, Any], checkpoint: Checkpoint | None
) -> JournalWriter:
    """The run's journal, which goes on after the checkpoint."""
    journal = JournalWriter(output)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {"versions": package_versions(LIBRARIES), "started": started, **identity}
    journal.begin(0 if checkpoint is None else checkpoint.manifest.step, facts)
    return journal


def load_checkpoint(
    checkpoint: Checkpoint, models: Mapping[str, TrainGroup], components: RunComponents
) -> None:
    """Load every model, then the driver's state."""
    same_ranks = True
    for role, group in models.items():
        folder = str((checkpoint.folder / role).resolve())
        optimizer = checkpoint.manifest.optimizer
        loaded = group.call_all("load_checkpoint", TrainWorker.load, role, folder, optimizer)
        same_ranks &= all(loaded)
    if not same_ranks:
        components.log.console.note(
            "other ranks than saved the checkpoint: equal to rounding, with fresh random state"
        )
    version = checkpoint.manifest.policy_version
    components.load_state_dict(checkpoint.state, version, checkpoint.folder)
