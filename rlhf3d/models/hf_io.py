"""Hugging Face folders on disk: read any block of any tensor, write a complete folder.

Invariant: only the bytes asked for are read and nothing is unpickled; a written folder appears complete or
not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlhf3d.models.boxes import Box, box_slices

INDEX_NAME = "model.safetensors.index.json"
COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


class HFReader:
    """Blocks of the tensors of a folder with one safetensors file or shards under an index."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        index = self.folder / INDEX_NAME
        if index.is_file():
            self._files = json.loads(index.read_text())["weight_map"]
        else:
            for file in sorted(self.folder.glob("*.safetensors")):
                self._files |= dict.fromkeys(self._open(file.name).keys(), file.name)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The block of tensor `name` inside `box`, in the file's dtype."""
        block: torch.Tensor = self._slice(name)[box_slices(box)]
        return block

    def _slice(self, name: str) -> Any:
        return self._open(self._files[name]).get_slice(name)

    def _open(self, file_name: str) -> Any:
        if file_name not in self._handles:
            try:
                self._handles[file_name] = safe_open(self.folder / file_name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"model.path: cannot read {self.folder / file_name} ({error}); download it again"
                ) from error
        return self._handles[file_name]

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()


def write_hf_folder(
    destination: Path | str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    source_folder: Path | str,
    max_shard_gib: float = 4.0,
) -> None:
    """Write `tensors` as safetensors shards, with config and tokenizer of `source_folder`.

    Consumes `tensors` one at a time and holds at most one shard in memory.
    Raises ValueError if `destination` exists.
    """
    destination, source_folder = Path(destination), Path(source_folder)
    if destination.exists():
        raise ValueError(f"{destination} exists; remove it or choose another folder to write to")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        dtypes = _write_shards(partial, tensors, int(max_shard_gib * 2**30))
        copy_companions(source_folder, partial)
        record_dtype(partial / "config.json", dtypes)
        partial.chmod(0o755)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source_folder: Path, destination: Path) -> None:
    """Copy what a model folder holds beside weights: configuration, tokenizer, chat template."""
    for file in source_folder.iterdir():
        if file.is_file() and file.suffix in COMPANION_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, destination / file.name)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], limit_bytes: int) -> set[torch.dtype]:
    """Write the shards (one file without index if they fit in one) and return the dtypes written."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total_bytes = pending_bytes = 0
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        nonlocal pending_bytes
        save_file(pending, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu").contiguous()
        if pending and pending_bytes + tensor.nbytes > limit_bytes:
            flush()
        assert name not in pending and not any(name in shard for shard in shards), f"{name} written twice"
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtypes.add(tensor.dtype)
    flush()

    if len(shards) == 1:
        (folder / "0.partial").rename(folder / "model.safetensors")
        return dtypes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.partial").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return dtypes


def record_dtype(config_file: Path, dtypes: set[torch.dtype]) -> None:
    """Make the config's dtype the one written, so that loaders with dtype `auto` keep it."""
    if len(dtypes) != 1:
        return
    config = json.loads(config_file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(next(iter(dtypes))).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
