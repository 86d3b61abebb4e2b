"""Sharded checkpoint folders (megatron-core's torch_dist) by torch's distributed checkpoint.

No process group is needed. Reading holds one chunk at a time; writing, of each tensor that has
blocks in the files being written, one block.

Invariant: reading runs no code from the folder: its index may name data classes only. A folder is
complete once it has its index, which is written last.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from enum import Enum
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from rlhf3d.checkpoints.manifest import FileInfo, file_info
from rlhf3d.checkpoints.stored import OPTIMIZER_KEY
from rlhf3d.models.boxes import Box, full_box, inside, intersect, show

INDEX, BACKEND, COMMON = ".metadata", "metadata.json", "common.pt"
WRITERS = 2
"""Files written at a time: checksums of one while the other waits for the disk."""
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """The block `box` of the tensor `key`: `length` bytes of `file` from `offset` on."""

    key: str
    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a folder; its chunks tile it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


# Reading


class TorchDistReader:
    """The tensors of a folder. ValueError that names the file if the folder is not complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: list[str] = []
        for key, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = _stored_tensor(key, entry, index.storage_data, folder)
            else:
                self.objects.append(key)
        self._check_lengths()

    def _check_lengths(self) -> None:
        needed: dict[str, int] = {}
        for chunk in self.chunks():
            needed[chunk.file] = max(chunk.offset + chunk.length, needed.get(chunk.file, 0))
        for name, length in needed.items():
            path = self.folder / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ValueError(f"cannot read {path} ({error.strerror})") from error
            if size < length:
                raise ValueError(f"{path} is cut off: it has {size} bytes, {length} are needed")

    def weight_keys(self) -> list[str]:
        """Keys of the model's tensors, without the optimizer's."""
        return [key for key in self.tensors if not OPTIMIZER_KEY.match(key)]

    def chunks(self) -> list[Chunk]:
        """All chunks, tensor by tensor."""
        found: list[Chunk] = []
        for tensor in self.tensors.values():
            found += tensor.chunks
        return found

    def read_chunk(self, chunk: Chunk) -> Tensor:
        """Return a chunk's values. ValueError that names its file if they are not what it is.

        torch's own loader would cut what is stored down to the size that the index says.
        """
        place = f"{self.folder / chunk.file}: "
        with open(self.folder / chunk.file, "rb") as file:
            try:
                part = _create_file_view(file, chunk.offset, chunk.length)
                values: Tensor = torch.load(part, map_location="cpu", weights_only=True)
                found = (tuple(values.shape), values.dtype)
            except Exception as error:
                # torch raises many kinds for bytes that are no tensor, some with the advice to
                # load them without its safeguards: not for the user to read.
                raise ValueError(
                    f"{place}no tensor at byte {chunk.offset} ({type(error).__name__}): "
                    "copy it again"
                ) from error
        said = (_sizes(chunk.box), self.tensors[chunk.key].dtype)
        if found != said:
            raise ValueError(
                f"{place}the block {show(chunk.box)} of {chunk.key} is {list(found[0])} of "
                f"{found[1]}, the index says {list(said[0])} of {said[1]}: copy both again"
            )
        return values

    def read(self, key: str, box: Box) -> Tensor:
        """Return the block `box` of a tensor."""
        stored = self.tensors[key]
        block = torch.empty(_sizes(box), dtype=stored.dtype)
        # One chunk in memory at a time.
        for chunk in stored.chunks:
            part = intersect(chunk.box, box)
            if part is not None:
                values = self.read_chunk(chunk)
                block[inside(part, box)] = values[inside(part, chunk.box)]
        return block

    def corrupt_files(self) -> list[str]:
        """Return the files with a tensor that differs from the checksum torch.save gave it."""
        corrupt = set()
        for chunk in self.chunks():
            with open(self.folder / chunk.file, "rb") as file:
                file.seek(chunk.offset)
                content = io.BytesIO(file.read(chunk.length))
            try:
                with zipfile.ZipFile(content) as archive:
                    bad = archive.testzip()
            except (zipfile.BadZipFile, zlib.error):
                bad = chunk.file
            if bad is not None:
                corrupt.add(chunk.file)
        return sorted(corrupt)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _placed(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(start for start, _ in box), torch.Size(_sizes(box)))


def _stored_tensor(
    key: str, entry: TensorStorageMetadata, places: Mapping[Any, Any], folder: Path
) -> StoredTensor:
    chunks = []
    for chunk in entry.chunks:
        place = places.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise ValueError(f"{folder / INDEX} names no file for {key} {list(chunk.offsets)}")
        box = tuple((a, a + size) for a, size in zip(chunk.offsets, chunk.sizes, strict=True))
        chunks.append(Chunk(key, box, place.relative_path, place.offset, place.length))
    stored = StoredTensor(entry.properties.dtype, tuple(entry.size), tuple(chunks))
    _check_tiling(key, stored, folder)
    return stored


def _check_tiling(key: str, tensor: StoredTensor, folder: Path) -> None:
    complete = full_box(tensor.shape)
    inside = all(intersect(chunk.box, complete) == chunk.box for chunk in tensor.chunks)
    starts, covered = set(), 0
    for chunk in tensor.chunks:
        starts.add(tuple(start for start, _ in chunk.box))
        covered += prod(stop - start for start, stop in chunk.box)
    if not inside or len(starts) != len(tensor.chunks) or covered != prod(tensor.shape):
        raise ValueError(
            f"{folder / INDEX}: the chunks of {key} do not tile it: "
            f"{covered} of {prod(tensor.shape)} elements"
        )


def _read_index(folder: Path) -> Metadata:
    """The folder's index. ValueError if there is none that can be read."""
    backend = folder / BACKEND
    found = json.loads(backend.read_text()) if backend.is_file() else {}
    if found.get("sharded_backend") != _BACKEND["sharded_backend"]:
        raise ValueError(
            f"{backend} does not say sharded_backend torch_dist: "
            "not a checkpoint that can be read here"
        )
    try:
        with open(folder / INDEX, "rb") as file:
            index: Metadata = _IndexUnpickler(file).load()
        index.state_dict_metadata, index.storage_data  # noqa: B018 - absent in another pickle
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {INDEX}: the checkpoint was never finished, or copied without it"
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{folder / INDEX} is not a checkpoint's index ({error}): copy it again"
        ) from error
    return index


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index: torch's data classes and enumerations, sizes, dtypes and paths."""

    def find_class(self, module: str, name: str) -> Any:
        if module in (
            "torch.distributed.checkpoint.metadata",
            "torch.distributed.checkpoint.planner",
        ):
            found = getattr(import_module(module), name)
            if is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum)):
                return found
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return getattr(import_module(module), name)
        if module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(torch, name)
        # How torch.layout pickles itself, as a part of TensorProperties.
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        paths = ("PosixPath", "PurePosixPath", "WindowsPath")
        if module in ("pathlib", "pathlib._local") and name in paths:
            return Path
        if module.startswith("megatron.core.dist_checkpointing"):
            return type(name, (), {})  # what older versions put next to the tensors
        raise pickle.UnpicklingError(f"it names {module}.{name}")


# Writing


@dataclass(frozen=True)
class Block:
    """The block `box` of the tensor `key`, of `shape`, to be stored as one chunk."""

    key: str
    box: Box
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.dtype.itemsize * prod(stop - start for start, stop in self.box)


def write_folder(
    folder: Path,
    files: Sequence[Sequence[Block]],
    values: Callable[[Block], Tensor],
    empty_objects: Iterable[str] = (),
    common: Mapping[str, Any] | None = None,
) -> dict[str, FileInfo]:
    """Write a folder of `files`, each with its blocks in their order. Return size and checksum of
    each, by name.

    `values` is called for a block when it is written, from one of WRITERS threads. `empty_objects`
    are the names of objects that are None, `common` is megatron-core's state that is no tensor.
    """
    blocks: dict[MetadataIndex, Block] = {}
    plans = []
    for held in filter(None, files):
        items = [_write_item(block) for block in held]
        blocks.update(zip((item.index for item in items), held, strict=True))
        plans.append(SavePlan(items))
    objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in empty_objects]
    if objects:
        plans.append(SavePlan(objects))
    folder.mkdir(parents=True, exist_ok=True)
    storage = _Writer(folder, sync_files=False)  # `file_info` does
    plans, index = create_default_global_save_plan(plans)
    # torch gives each rank's plan a file: here each file is a plan.
    plans = storage.prepare_global_plan(plans)
    planner = _Lazy(blocks, values)
    infos: dict[str, FileInfo] = {}

    def write(plan: SavePlan) -> list[WriteResult]:
        results = storage.write_data(plan, planner).wait()
        # FileSystemWriter puts all items of a plan into a single file by default.
        name = results[0].storage_data.relative_path
        infos[name] = file_info(folder / name)
        return results

    with ThreadPoolExecutor(WRITERS) as threads:
        results = list(threads.map(write, plans))
    torch.save(dict(common or {}), folder / COMMON)
    (folder / BACKEND).write_text(json.dumps(_BACKEND))
    # Writes .metadata, without which the folder is no checkpoint: after all else is there.
    storage.finish(index, results)
    return infos


def _write_item(block: Block) -> WriteItem:
    chunk = _placed(block.box)
    data = TensorWriteData(chunk, TensorProperties(block.dtype), torch.Size(block.shape))
    return WriteItem(MetadataIndex(block.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _Writer(FileSystemWriter):
    """torch's writer, with an index that is the same for the same tensors."""

    def storage_meta(self) -> None:
        """Leave out the folder's path at the time of writing, and a random number."""


class _Lazy(DefaultSavePlanner):
    """Has each block's values made when they are written."""

    def __init__(
        self, blocks: Mapping[MetadataIndex, Block], values: Callable[[Block], Tensor]
    ) -> None:
        super().__init__()
        self.blocks, self.values = blocks, values

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            # Megatron stores an object as the list of its local shards' data; here one, empty.
            torch.save([None], content)
            return content
        return self.values(self.blocks[write_item.index])
