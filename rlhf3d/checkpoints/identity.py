"""Which model a run began with, when, and which code of the user's it executes: in checkpoints.

Invariant: a folder that was moved is the same model, one with other weights is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf3d.config.groups import worker_groups
from rlhf3d.config.keys import code_files
from rlhf3d.config.schema import Config
from rlhf3d.models.folder import weight_files
from rlhf3d.models.spec import ModelSpec
from rlhf3d.tokenizer.clock import TEMPLATE_CLOCK

_SAMPLED_BYTES = 64 << 10


def model_identity(folder: Path | str) -> str:
    """Return a digest of the weight files: sizes, and 64 KiB at start, middle and end of each."""
    digest = hashlib.sha256()
    for path in (Path(folder) / name for name in weight_files(Path(folder)).names):
        size = path.stat().st_size
        # Names without the folder, so that a folder that was moved has the same digest.
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            # Samples, since every start computes this and weight files have many GB.
            for offset in (0, size // 2, max(0, size - _SAMPLED_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def code_identity(files: Mapping[str, str]) -> dict[str, str]:
    """Digest of each of the `code_files`, by key; what they import has none."""
    return {
        key: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for key, file in files.items()
    }


def identity_state(config: Config, spec: ModelSpec) -> dict[str, Any]:
    """What `check_resume` compares besides the configuration, and `began`, the local time that chat
    templates are told; part of the driver's state.
    """
    layouts: dict[str, str] = {}
    for group in worker_groups(config):
        layouts |= dict.fromkeys(group.roles, str(group.layout))
    return {
        "model": {"identity": model_identity(config.model.path), "spec": asdict(spec)},
        "layouts": layouts,
        "code": code_identity(code_files(config)),
        "began": TEMPLATE_CLOCK.now().isoformat(),
    }
