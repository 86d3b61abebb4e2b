"""The folder `checkpoints/` of a run: which are complete, how one is added, which are removed.

Invariant: `step_N` with a manifest appears and disappears in one rename, and everything it says is
on disk before it appears. Leftovers of a killed process have other names and are removed at the
next start.

Runs in: driver.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rlhf3d.checkpoints.manifest import MANIFEST, read_manifest
from rlhf3d.new_folder import sync

LATEST, DRIVER_FILE, CONFIG_FILE = "latest", "driver.json", "config.yaml"
EXPERIENCE_FOLDER, QUEUE_FILE = "experience", "queue.json"
"""Trajectories that are ahead of the training, and in their folder the file that counts them."""
PARTIAL, DELETED = ".partial", ".deleted"


def reached(stage: str) -> None:
    """Called at each stage of a save, for the log (and for tests that kill the process there)."""
    logging.getLogger(__name__).debug("save: %s", stage)


class Store:
    """One such folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending."""
        # Full match: step_8.partial, step_8.deleted and step_8.aside are no checkpoints.
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*"))
        return sorted(
            int(match[1])
            for match in found
            if match and (self.folder / match[0] / MANIFEST).is_file()
        )

    def metrics(self) -> dict[int, float]:
        """The metric of each step that was validated; a checkpoint that is damaged has none."""
        found: dict[int, float] = {}
        for step in self.steps():
            with suppress(ValueError):
                # A manifest holds one metric or none.
                for value in read_manifest(self.path(step)).metric.values():
                    found[step] = value
        return found

    def path(self, step: int) -> Path:
        """Folder of a step."""
        return self.folder / f"step_{step}"

    def begin(self, step: int) -> Path:
        """A new empty folder to write a step into."""
        partial = self.path(step).with_name(f"step_{step}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        reached("begun")
        return partial

    def publish(self, step: int, partial: Path) -> Path:
        """Give a complete folder its name, and `latest` to it; an older one of that name goes."""
        final = self.path(step)
        reached("complete")
        # A rename cannot replace a folder that is not empty.
        if final.exists():
            self._remove(final)
        os.replace(partial, final)
        sync(self.folder)
        reached("renamed")
        # After the rename, so that `latest` never names a folder that is not there yet; through
        # a file of its own, so that it is never half written.
        pointer = self.folder / f"{LATEST}{PARTIAL}"
        pointer.write_text(final.name)
        os.replace(pointer, self.folder / LATEST)
        reached("latest")
        return final

    def keep(self, last: int | None, best: int, metrics: Mapping[int, float]) -> list[int]:
        """Remove what is neither among the `last` newest nor the `best` highest by metric.

        Return the steps removed.
        """
        gone = expendable(self.steps(), last, best, metrics)
        for step in gone:
            self._remove(self.path(step))
        return gone

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(path.name + DELETED)
        shutil.rmtree(doomed, ignore_errors=True)
        # Renamed first: deleting takes a while, and a folder that is half deleted must not have
        # the name of a checkpoint.
        os.replace(path, doomed)
        sync(self.folder)
        reached("removing")
        shutil.rmtree(doomed)

    def clean(self) -> list[str]:
        """Remove what a killed process left behind; its names."""
        left = [*self.folder.glob(f"*{PARTIAL}"), *self.folder.glob(f"*{DELETED}")]
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return sorted(path.name for path in left)


def expendable(
    steps: list[int], last: int | None, best: int, metrics: Mapping[int, float]
) -> list[int]:
    """Which of the ascending `steps` to remove; never the newest. `last` None keeps all."""
    if last is None:
        return []
    # Highest metric first; of equal ones the newest.
    ranked = sorted(
        (step for step in steps if step in metrics), key=lambda step: (-metrics[step], -step)
    )
    # At least 1: a slice from -0 on would keep all.
    kept = {*steps[-max(last, 1) :], *ranked[:best]}
    return [step for step in steps if step not in kept]
