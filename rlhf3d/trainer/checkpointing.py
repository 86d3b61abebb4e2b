"""Saving: room is checked, ranks write, the manifest follows, one rename publishes, old ones go.

Invariant: one save is under way at most, the newest complete checkpoint is never touched before the
next one is complete, and what goes wrong in the background is raised at the next call.
Runs in: driver; what a rank writes is `checkpoints/sharded.py`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf3d import units
from rlhf3d.checkpoints.identity import identity_state
from rlhf3d.checkpoints.manifest import FileInfo, Manifest, infos_below, versions, write_manifest
from rlhf3d.checkpoints.resume import CHECKPOINTS
from rlhf3d.checkpoints.store import CONFIG_FILE, DRIVER_FILE, Store, reached
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import num_weights
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import WorkerFailure
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.trainer.hf_export import HFExport

HF_FOLDER = "hf"
_SPARE_BYTES = 64 << 20
"""Left free next to a checkpoint, for metrics, samples and logs."""
_FULL_BYTES = 1 << 20
"""A disk with less than this is full: a write that failed on it failed for that reason."""
_GUESSED_BYTES_PER_S = 200e6
"""A slow disk's speed, to guess what the first save will take."""


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
    """Writes the folders `checkpoints/step_N`.

    `actor/` and `critic/` are sharded, `hf/` is the actor as a Hugging Face folder, `driver.json`
    the driver's state, `config.yaml` the run's configuration.
    """

    def __init__(
        self, config: Config, spec: ModelSpec, models: Mapping[str, TrainGroup], export: HFExport
    ) -> None:
        """`models`: the trainable ones and the groups that hold them.

        ValueError where there is no room for a save, or a wanted export cannot be made.
        """
        self.config, self.models, self.export = config.trainer, dict(models), export
        self.store = Store(Path(config.trainer.output_dir) / CHECKPOINTS)
        self.last: Path | None = None
        """The newest that this process has written."""
        self._save: _Save | None = None
        self._weights = {
            role: num_weights(spec, "value" if role == "critic" else "lm") for role in models
        }
        self._dtype = config.model.dtype
        self._identity = identity_state(config, spec)
        self._config_text = config_to_yaml(config)
        self.save_s = self._bytes(export=False) / _GUESSED_BYTES_PER_S
        """Seconds of the latest save, waited for or not; a guess before the first."""
        exports = self.config.save_hf != "never"
        self.check_room(exports)
        if exports:
            export.check()

    def check_room(self, export: bool) -> None:
        """ValueError unless the disk has room for one more checkpoint."""
        wanted = self._bytes(export)
        self.store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.store.folder).free
        if free < wanted + _SPARE_BYTES:
            raise ValueError(
                f"{self.store.folder}: a checkpoint takes about {wanted / 2**30:.2f} GiB and "
                f"{free / 2**30:.2f} GiB are free. Make room, or set trainer.keep_last, "
                "trainer.save_optimizer=false (no resume), trainer.save_hf=never or another "
                "trainer.output_dir"
            )

    def save(
        self,
        step: int,
        policy_version: int,
        state: Callable[[], dict[str, Any]],
        metric: dict[str, float],
        *,
        last: bool,
        wait: bool,
        more: Callable[[Path], None] | None = None,
    ) -> dict[str, float]:
        """Save a step; metrics of saves that ended.

        `state` gives the driver's own, as JSON, and `more` writes further files below the folder it
        gets: one right after the other, as wherever the driver waits, more may be drawn, and what
        is drawn between them would be in one and not in the other. `metric`: what the best
        checkpoints are kept by; `last`: no step follows. With trainer.async_save, and unless
        `wait`, it returns once every rank has copied what it writes.
        """
        # One save at a time: the one before is complete before the next takes room.
        metrics = self.finish()
        export = self.config.save_hf == "always" or (self.config.save_hf == "last" and last)
        # Again at each save: the disk may have filled since the start.
        self.check_room(export)
        began = time.monotonic()
        partial = self.store.begin(step)
        save = _Save(step, partial, {"policy_version": policy_version, "metric": metric}, began)
        wait = wait or not self.config.async_save
        with self._removed_on_error(save):
            driver = {"step": step, **self._identity, **state()}
            (partial / DRIVER_FILE).write_text(json.dumps(driver, indent=1))
            (partial / CONFIG_FILE).write_text(self._config_text, encoding="utf-8")
            if more is not None:
                more(partial)
            if export:
                for file in self.export.write(partial / HF_FOLDER, policy_version):
                    info = FileInfo(file.num_bytes, file.crc32)
                    save.files[f"{HF_FOLDER}/{file.path.name}"] = info
                reached("exported")
            for role, group in self.models.items():
                (partial / role).mkdir()
                folder = str((partial / role).resolve())
                group.call_all("save_checkpoint", TrainWorker.start_save, role, folder, wait)
                save.writing.append(role)
        save.held_s = time.monotonic() - began
        self._save = save
        return metrics | (self.finish() if wait else {})

    def poll(self) -> dict[str, float]:
        """At a step boundary: complete a save whose files are written; its metrics."""
        save = self._save
        if save is None:
            return {}
        # Every rank is asked first: completing a save is collective, and would hold all ranks up
        # for the slowest writer.
        for role in save.writing:
            if not all(self.models[role].call_all("save_checkpoint", TrainWorker.written)):
                return {}
        return self.finish()

    def finish(self) -> dict[str, float]:
        """Wait for the save under way and publish it; its metrics."""
        # Forgotten first, so that a save that failed is not completed by the next call.
        save, self._save = self._save, None
        if save is None:
            return {}
        began = time.monotonic()
        with self._removed_on_error(save):
            # What else the driver wrote, read while the disk still writes the ranks' files, of
            # which they report the sizes and checksums.
            save.files |= infos_below(save.folder, skip=self.models, known=save.files)
            self._collect(save)
            reached("written")
            manifest = Manifest(
                save.step,
                models=tuple(self.models),
                optimizer=self.config.save_optimizer,
                versions=versions(),
                files=dict(sorted(save.files.items())),
                **save.manifest,
            )
            # Last: the manifest is what makes a folder a checkpoint.
            write_manifest(save.folder, manifest)
            self.last = self.store.publish(save.step, save.folder)
        # Only now: until here the checkpoints before were all there was.
        self.store.keep(self.config.keep_last, self.config.keep_best, self.store.metrics())
        ended = time.monotonic()
        self.save_s = ended - save.began
        return {
            "checkpoint/save_s": self.save_s,
            "checkpoint/held_s": save.held_s + (ended - began),
            "checkpoint/bytes": float(sum(info.bytes for info in manifest.files.values())),
        }

    def _bytes(self, export: bool) -> int:
        return checkpoint_bytes(self._weights, self._dtype, self.config.save_optimizer, export)

    def _collect(self, save: _Save) -> None:
        """Wait for the ranks that write, and take their files' sizes and checksums."""
        while save.writing:
            role = save.writing.pop(0)
            for files in self.models[role].call_all("save_checkpoint", TrainWorker.finish_save):
                save.files |= {f"{role}/{name}": FileInfo(*info) for name, info in files.items()}
            reached(f"{role} written")

    @contextmanager
    def _removed_on_error(self, save: _Save) -> Iterator[None]:
        """Give back the disk's room when a save fails, and say what to do about a full one."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            # Whatever failed, other ranks may still write into what is to be removed.
            while save.writing:
                with suppress(RuntimeError):
                    self._collect(save)
            # torch's own writer calls a full disk an iostream error.
            # Asked before the removal, which makes room.
            free = shutil.disk_usage(self.store.folder).free
            full = free < _FULL_BYTES or "No space left on device" in str(error)
            shutil.rmtree(save.folder, ignore_errors=True)
            if full and isinstance(error, WorkerFailure | OSError):
                raise RuntimeError(
                    f"the disk of {self.store.folder} is full; the checkpoint under way was "
                    "removed, those before it are complete (newest: "
                    f"{self.last or 'none of this process'}). Make room and run again, or set "
                    "trainer.keep_last"
                ) from error
            raise


def checkpoint_bytes(weights: Mapping[str, int], dtype: str, optimizer: bool, export: bool) -> int:
    """Return what a checkpoint of models takes on disk; `weights`: their number, by role."""
    exported = units.checkpoint_bytes(weights["actor"], dtype, optimizer=False) if export else 0
    return units.checkpoint_bytes(sum(weights.values()), dtype, optimizer) + exported
