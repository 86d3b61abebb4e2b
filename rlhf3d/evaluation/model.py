"""The model that is evaluated: where it is, and which one it is.

Invariant: a folder whose weights were replaced has another digest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SMALL_BYTES = 16 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def find_model(path: str | Path) -> Path:
    """Return the Hugging Face folder that `path` is, or that a checkpoint or run there holds.

    Of a run that of the last step. ValueError without one.
    """
    path = Path(path)
    steps = sorted(path.glob("checkpoints/step_*/hf"), key=_step_number)
    for folder in [path, path / "hf", *reversed(steps)]:
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"no model at {path}: give a Hugging Face folder (config.json, safetensors, tokenizer), a "
        "checkpoint (checkpoints/step_N) or a run's folder"
    )


def _step_number(hf_folder: Path) -> int:
    digits = hf_folder.parent.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def model_digest(folder: Path) -> str:
    """Return a digest of a model folder: its small files, and of large ones size and samples."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _SMALL_BYTES:
                digest.update(file.read())
                continue
            # Reading all of the weights would take longer than loading them.
            for place in range(_SAMPLES):
                # Evenly spread, from the file's first bytes to its last ones.
                file.seek(place * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
