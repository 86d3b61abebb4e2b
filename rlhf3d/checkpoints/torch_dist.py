"""Sharded checkpoint folders (megatron-core's torch_dist) by torch's distributed checkpoint.

No process group is needed. A chunk that is read is mapped where it lies in its file; writing holds
one block for each file that is being written.

Invariant: reading runs no code from the folder: its index may name data classes only. A folder is
complete once it has its index, which is written last.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from enum import Enum
from importlib import import_module
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
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

from rlhf3d.checkpoints.manifest import FileInfo, file_info
from rlhf3d.checkpoints.stored import OPTIMIZER_KEY
from rlhf3d.disk import NewFile, start_reading
from rlhf3d.models.boxes import Box, full_box, inside, intersect, show

if TYPE_CHECKING:
    from typing_extensions import Buffer

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

        A view of the file where that is possible: copy it to change it. torch's own loader would
        cut what is stored down to the size that the index says.
        """
        place = f"{self.folder / chunk.file}: "
        with open(self.folder / chunk.file, "rb") as file:
            try:
                values = _load(file, chunk)
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


def _load(file: IO[bytes], chunk: Chunk) -> Tensor:
    """The tensor of a chunk, mapped if its values lie in the file as this machine computes with."""
    extra = chunk.offset % mmap.ALLOCATIONGRANULARITY
    # Private: whoever writes to the tensor changes a copy and not the file.
    pages = mmap.mmap(
        file.fileno(),
        extra + chunk.length,
        access=mmap.ACCESS_COPY,
        offset=chunk.offset - extra,
    )
    start_reading(file, chunk.offset, chunk.length)  # a chunk is asked for before it is used
    content = memoryview(pages)[extra:]
    values = _stored_values(content)
    if values is None:
        loaded: Tensor = torch.load(_Archive(content), map_location="cpu", weights_only=True)
        return loaded
    # Shape, strides and dtype; no values are read.
    form: Tensor = torch.load(_Archive(content), map_location="meta", weights_only=True)
    # torch would take what lies beside the record for values.
    if form.untyped_storage().nbytes() != len(values):
        raise ValueError(f"{len(values)} bytes for {form}")
    data = torch.frombuffer(values, dtype=torch.uint8)
    if data.data_ptr() % form.itemsize:
        data = data.clone()  # torch aligns within an archive, not where the next one begins
    found = torch.empty(0, dtype=form.dtype)
    return found.set_(data.untyped_storage(), form.storage_offset(), form.shape, form.stride())


def _stored_values(content: memoryview) -> memoryview | None:
    """The only storage of an archive; None if it is empty, compressed or in another byte order."""
    with zipfile.ZipFile(_Archive(content)) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        order = archive.read(records["byteorder"]) if "byteorder" in records else b""
    (info,) = [info for name, info in records.items() if name.startswith("data/")]
    stored = info.compress_type == zipfile.ZIP_STORED and order == sys.byteorder.encode()
    if not stored or not info.file_size:
        return None
    # The record has a header of 30 bytes, its name and a padding whose lengths are in the header.
    lengths = struct.unpack_from("<HH", content, info.header_offset + 26)
    start = info.header_offset + 30 + sum(lengths)
    return content[start : start + info.file_size]


class _Archive(io.RawIOBase):
    """Bytes in memory as a file; io.BytesIO would copy them."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content, self._place = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + (0, self._place, len(self._content))[whence]
        if place < 0:
            raise OSError(f"byte {place}")
        self._place = place
        return place

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        part = self._content[self._place : self._place + len(target)]
        target[: len(part)] = part
        self._place += len(part)
        return len(part)


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
    plans, index = create_default_global_save_plan(plans)

    def data(item: WriteItem) -> Tensor | io.BytesIO:
        if item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            # Megatron stores an object as the list of its local shards' data; here one, empty.
            torch.save([None], content)
            return content
        return values(blocks[item.index])

    def write(name: str, plan: SavePlan) -> tuple[list[WriteResult], FileInfo]:
        found = ((item, data(item)) for item in plan.items)
        results, file = write_items(folder / name, found)
        file.sync()
        return results, FileInfo(file.num_bytes, file.crc32)

    # As torch names the files of ranks, of which each writes one plan.
    names = [f"__{number}_0{DEFAULT_SUFFIX}" for number in range(len(plans))]
    with ThreadPoolExecutor(WRITERS) as threads:
        written = list(threads.map(write, names, plans))
    torch.save(dict(common or {}), folder / COMMON)
    (folder / BACKEND).write_text(json.dumps(_BACKEND))
    # Writes .metadata, without which the folder is no checkpoint: after all else is there.
    _Writer(folder, sync_files=False).finish(index, [results for results, _ in written])
    infos = {name: info for name, (_, info) in zip(names, written, strict=True)}
    return infos | {name: file_info(folder / name) for name in (INDEX, BACKEND, COMMON)}


def write_items(
    path: Path, items: Iterable[tuple[WriteItem, Tensor | io.BytesIO]]
) -> tuple[list[WriteResult], NewFile]:
    """Write a file of a folder; where in it each item is, and the file, which is yet to be synced.

    `items` comes with each item's values; of a generator one is in memory at a time. Tensors on a
    device are copied to the host.
    """
    file, results = NewFile(path), []
    try:
        for item, data in items:
            start = file.tell()
            if isinstance(data, io.BytesIO):
                file.write(data.getbuffer())
            else:
                torch.save(_of_its_own(data), file)
            length = file.tell() - start
            place = _StorageInfo(path.name, start, length)
            results.append(WriteResult(item.index, length, place))
            del data  # before the next one is made
    except BaseException:
        file.close()
        raise
    return results, file


def _of_its_own(tensor: Tensor) -> Tensor:
    """The tensor on the host, in storage of its size: torch.save writes a view's whole storage."""
    tensor = tensor.detach().cpu()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone() if is_view else tensor


def _write_item(block: Block) -> WriteItem:
    chunk = _placed(block.box)
    data = TensorWriteData(chunk, TensorProperties(block.dtype), torch.Size(block.shape))
    return WriteItem(MetadataIndex(block.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _Writer(FileSystemWriter):
    """torch's writer, with an index that is the same for the same tensors."""

    def storage_meta(self) -> None:
        """Leave out the folder's path at the time of writing, and a random number."""
