"""Checkpoints on disk, from the driver: written beside, manifest last, renamed into place.

Invariant: a folder `checkpoints/step_N` with a `manifest.json` is complete; anything else is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import Config
from rlhf3d.models.hf_io import write_hf_folder
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.resharding.sync import WeightSync

FORMAT_VERSION = 1


class CheckpointWriter:
    """Writes `checkpoints/step_N`: `actor/`, `critic/` (sharded), `hf/` (the actor), `driver.json`, `config.yaml`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.trainer.output_dir) / "checkpoints"

    def save(self, step: int, groups: Sequence[TrainGroup], sync: WeightSync, state: dict[str, Any]) -> Path:
        """Save a step; the checkpoint's folder. `state` is the driver's own, as JSON."""
        final, partial = self.folder / f"step_{step}", self.folder / f"step_{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for group in groups:
            group.call_all("save_checkpoint", "save", str(partial.resolve()))
        write_hf_folder(partial / "hf", sync.export_tensors(), Path(self.config.model.path))
        (partial / "driver.json").write_text(json.dumps({"step": step, **state}, indent=1))
        (partial / "config.yaml").write_text(config_to_yaml(self.config))
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": _sizes(partial)}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        latest = self.folder / "latest.partial"
        latest.write_text(final.name)
        os.replace(latest, self.folder / "latest")
        return final


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by relative name."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
