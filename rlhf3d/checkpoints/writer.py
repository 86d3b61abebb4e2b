"""Saving from the driver: room is checked, ranks write, the manifest follows, one rename publishes, old ones go.

Invariant: one save is under way at most, the newest whole checkpoint is never touched before the next one is whole, and
what goes wrong in the background is raised at the next call.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf3d import units
from rlhf3d.checkpoints.identity import identity_state
from rlhf3d.checkpoints.manifest import FileInfo, Manifest, infos_below, versions, write_manifest
from rlhf3d.checkpoints.store import CONFIG_FILE, DRIVER_FILE, Store, reached
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import Config
from rlhf3d.models.hf_io import write_hf_folder
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import num_weights
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import WorkerFailure
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.resharding.sync import WeightSync

HF_FOLDER = "hf"
_SPARE_BYTES = 64 << 20
_FULL_BYTES = 1 << 20
_GUESSED_BYTES_PER_S = 200e6


@dataclass
class _Save:
    """A save under way."""

    step: int
    folder: Path
    manifest: dict[str, Any]
    began: float
    held_s: float = 0.0
    writing: list[str] = field(default_factory=list)
    """Models that ranks still write, in the order of their starts."""
    files: dict[str, FileInfo] = field(default_factory=dict)


class CheckpointWriter:
    """Writes `checkpoints/step_N`: `actor/`, `critic/` (sharded), `hf/` (the actor), `driver.json`, `config.yaml`."""

    def __init__(
        self, config: Config, spec: ModelSpec, models: Mapping[str, TrainGroup], sync: WeightSync
    ) -> None:
        """`models`: the trainable ones and the groups that hold them. ValueError where there is no room for a save."""
        self.config, self.sync, self.models = config, sync, dict(models)
        self.store = Store(Path(config.trainer.output_dir) / "checkpoints")
        self.last: Path | None = None
        """The newest that this process has written."""
        self._save: _Save | None = None
        weights = {
            role: num_weights(spec, "value" if role == "critic" else "lm") for role in models
        }
        self._sizes = (weights, config.model.dtype)
        self._identity = identity_state(config, spec)
        self.save_s = (
            checkpoint_bytes(*self._sizes, config.trainer.save_optimizer, export=False)
            / _GUESSED_BYTES_PER_S
        )
        """Seconds of the latest save, whether the loop waited for it or not; a guess before the first."""

    def check_room(self, export: bool) -> None:
        """ValueError unless the disk has room for one more checkpoint."""
        wanted = checkpoint_bytes(*self._sizes, self.config.trainer.save_optimizer, export)
        self.store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.store.folder).free
        if free < wanted + _SPARE_BYTES:
            raise ValueError(
                f"{self.store.folder}: a checkpoint takes about {wanted / 2**30:.2f} GiB and {free / 2**30:.2f} GiB "
                "are free. Make room, or set trainer.keep_last, trainer.save_optimizer=false (no resume), "
                "trainer.save_hf=never or another trainer.output_dir"
            )

    def save(
        self, step: int, state: dict[str, Any], metric: dict[str, float], export: bool, wait: bool
    ) -> dict[str, float]:
        """Save a step; metrics of saves that ended. `state` is the driver's own, as JSON.

        With trainer.async_save, and unless `wait`, it returns once every rank has its copy.
        """
        metrics = self.finish()
        self.check_room(export)
        began = time.monotonic()
        partial = self.store.begin(step)
        manifest = {"policy_version": self.sync.trained_version, "metric": metric}
        save = _Save(step, partial, manifest, began)
        wait = wait or not self.config.trainer.async_save
        with self._removed_on_error(partial):
            (partial / DRIVER_FILE).write_text(
                json.dumps({"step": step, **self._identity, **state}, indent=1)
            )
            (partial / CONFIG_FILE).write_text(config_to_yaml(self.config), encoding="utf-8")
            if export:
                write_hf_folder(
                    partial / HF_FOLDER, self.sync.export_tensors(), Path(self.config.model.path)
                )
                reached("exported")
            for role, group in self.models.items():
                (partial / role).mkdir()
                group.call_all(
                    "save_checkpoint", TrainWorker.start_save, role, str((partial / role).resolve())
                )
                save.writing.append(role)
                if wait:
                    self._collect(save)
        save.held_s = time.monotonic() - began
        self._save = save
        return {**metrics, **(self.finish() if wait else {})}

    def poll(self) -> dict[str, float]:
        """At a step boundary: complete a save whose files are written; its metrics."""
        save = self._save
        if save is None or not all(
            all(self.models[role].call_all("save_checkpoint", TrainWorker.written))
            for role in save.writing
        ):
            return {}
        return self.finish()

    def finish(self) -> dict[str, float]:
        """Wait for the save under way and publish it; its metrics."""
        save, self._save = self._save, None
        if save is None:
            return {}
        began = time.monotonic()
        with self._removed_on_error(save.folder):
            self._collect(save)
            save.files |= infos_below(save.folder, skip=save.files)
            reached("written")
            optimizer = self.config.trainer.save_optimizer
            manifest = Manifest(
                save.step,
                models=tuple(self.models),
                optimizer=optimizer,
                versions=versions(),
                files=dict(sorted(save.files.items())),
                **save.manifest,
            )
            write_manifest(save.folder, manifest)
            self.last = self.store.publish(save.step, save.folder)
        trainer = self.config.trainer
        self.store.keep(trainer.keep_last, trainer.keep_best, self.store.metrics())
        ended = time.monotonic()
        self.save_s = ended - save.began
        held = save.held_s + (ended - began)
        return {
            "checkpoint/save_s": self.save_s,
            "checkpoint/held_s": held,
            "checkpoint/bytes": float(sum(info.bytes for info in manifest.files.values())),
        }

    def _collect(self, save: _Save) -> None:
        """Wait for the ranks that write, and take their files' sizes and checksums."""
        while save.writing:
            role = save.writing.pop(0)
            for files in self.models[role].call_all("save_checkpoint", TrainWorker.finish_save):
                save.files |= {f"{role}/{name}": FileInfo(*info) for name, info in files.items()}
            reached(f"{role} written")

    @contextmanager
    def _removed_on_error(self, partial: Path) -> Iterator[None]:
        """Give back the disk's room when a save fails, and say what to do about a full one."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch's own writer calls a full disk an iostream error.
            full = shutil.disk_usage(
                self.store.folder
            ).free < _FULL_BYTES or "No space left on device" in str(error)
            shutil.rmtree(partial, ignore_errors=True)
            if full and isinstance(error, WorkerFailure | OSError):
                raise RuntimeError(
                    f"the disk of {self.store.folder} is full; the checkpoint under way was removed, those before it "
                    f"are whole (newest: {self.last or 'none of this process'}). Make room and run again, or set "
                    "trainer.keep_last"
                ) from error
            raise


def checkpoint_bytes(weights: Mapping[str, int], dtype: str, optimizer: bool, export: bool) -> int:
    """What a checkpoint of models with so many `weights` takes on disk."""
    exported = units.checkpoint_bytes(weights["actor"], dtype, optimizer=False) if export else 0
    return units.checkpoint_bytes(sum(weights.values()), dtype, optimizer) + exported
