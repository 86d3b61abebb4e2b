"""megatron-core's `torch_dist` folder without process groups: read blocks of its global tensors, write a folder.

Invariant: reading runs no code from the folder (its index may name data classes only); a folder is whole once it has
its `.metadata`, written last. The format is torch.distributed.checkpoint's: files of `torch.save` blobs and an index.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from importlib import import_module
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from rlhf3d.checkpoints.blocks import FileTensor, InputFile
from rlhf3d.checkpoints.manifest import FileInfo
from rlhf3d.checkpoints.stored import OPTIMIZER_KEY
from rlhf3d.models.boxes import Box, full_box, intersect

INDEX, BACKEND, COMMON = ".metadata", "metadata.json", "common.pt"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A block of a global tensor: `length` bytes of `file` from `offset` on hold it, saved by torch."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor; its chunks tile it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """The global tensors of a folder. ValueError naming the file where the folder is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: list[str] = []
        for key, entry in index.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                self.objects.append(key)
                continue
            chunks = tuple(_chunk(key, chunk, index.storage_data, folder) for chunk in entry.chunks)
            self.tensors[key] = StoredTensor(entry.properties.dtype, tuple(entry.size), chunks)
            _check_tiling(key, self.tensors[key], folder)
        self._files = {
            name: InputFile(folder / name) for name in sorted({c.file for c in self._chunks()})
        }
        for chunk in self._chunks():
            if self._files[chunk.file].size < chunk.offset + chunk.length:
                path, size = folder / chunk.file, self._files[chunk.file].size
                raise ValueError(
                    f"{path} is cut off: it has {size} bytes, {chunk.offset + chunk.length} are needed"
                )
        self._blobs: dict[Chunk, FileTensor] = {}
        self._by_row = {key: _by_row(tensor.chunks) for key, tensor in self.tensors.items()}

    def weight_keys(self) -> list[str]:
        """Keys of the model's tensors, without the optimizer's."""
        return [key for key in self.tensors if not OPTIMIZER_KEY.match(key)]

    def _chunks(self) -> Iterator[Chunk]:
        return (chunk for tensor in self.tensors.values() for chunk in tensor.chunks)

    def read_into(self, key: str, box: Box, out: Tensor) -> None:
        """Copy the block `box` of a global tensor into `out` (its shape, any stride, any dtype)."""
        for rows, chunks in self._by_row[key].items():
            if box and intersect((rows,), box[:1]) is None:
                continue
            for chunk in chunks:
                common = intersect(chunk.box, box)
                if common is not None:
                    at = tuple(
                        slice(a - start, b - start)
                        for (a, b), (start, _) in zip(common, box, strict=True)
                    )
                    inside = tuple(
                        (a - start, b - start)
                        for (a, b), (start, _) in zip(common, chunk.box, strict=True)
                    )
                    self.blob(chunk).read_into(inside, out[at])

    def blob(self, chunk: Chunk) -> FileTensor:
        """Where a chunk's elements are."""
        if chunk not in self._blobs:
            found = _locate_blob(self._files[chunk.file], chunk)
            if found.shape != tuple(b - a for a, b in chunk.box):
                raise ValueError(
                    f"{self.folder / chunk.file} holds {found.shape} where its index says {chunk.box}"
                )
            self._blobs[chunk] = found
        return self._blobs[chunk]

    def blob_bytes(self, chunk: Chunk) -> bytes:
        """A chunk as torch.save wrote it."""
        return self._files[chunk.file].read(chunk.offset, chunk.length)

    def corrupt_files(self) -> list[str]:
        """Files in which a tensor is not what was written, by the checksum that torch.save puts beside each."""
        corrupt = set()
        for chunk in self._chunks():
            try:
                with zipfile.ZipFile(io.BytesIO(self.blob_bytes(chunk))) as archive:
                    bad = archive.testzip()
            except (zipfile.BadZipFile, zlib.error):
                bad = chunk.file
            if bad is not None:
                corrupt.add(chunk.file)
        return sorted(corrupt)


def _by_row(chunks: Iterable[Chunk]) -> dict[tuple[int, int], list[Chunk]]:
    """Chunks by their first dimension (the layer, of a stacked tensor)."""
    found: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.box[0] if chunk.box else (0, 1), []).append(chunk)
    return found


def _chunk(key: str, chunk: Any, storage: Mapping[Any, Any], folder: Path) -> Chunk:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    entry = storage.get(MetadataIndex(key, chunk.offsets))
    if entry is None:
        raise ValueError(f"{folder / INDEX} says in no file where {key} {list(chunk.offsets)} is")
    box = tuple(
        (start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )
    return Chunk(box, entry.relative_path, entry.offset, entry.length)


def _check_tiling(key: str, tensor: StoredTensor, folder: Path) -> None:
    whole = full_box(tensor.shape)
    inside = all(intersect(chunk.box, whole) == chunk.box for chunk in tensor.chunks)
    starts = {tuple(start for start, _ in chunk.box) for chunk in tensor.chunks}
    covered = sum(prod(b - a for a, b in chunk.box) for chunk in tensor.chunks)
    if not inside or len(starts) != len(tensor.chunks) or covered != prod(tensor.shape):
        raise ValueError(
            f"{folder / INDEX}: the chunks of {key} do not tile it: {covered} of {prod(tensor.shape)} elements"
        )


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index: the data classes and enumerations of torch.distributed.checkpoint, sizes, dtypes and paths."""

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
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module in ("pathlib", "pathlib._local") and name in (
            "PosixPath",
            "PurePosixPath",
            "WindowsPath",
        ):
            return Path
        if module.startswith(
            "megatron.core.dist_checkpointing"
        ):  # what older versions put beside the tensors
            return type(name, (), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_index(folder: Path) -> Any:
    backend = folder / BACKEND
    found = json.loads(backend.read_text()) if backend.is_file() else {}
    if found.get("sharded_backend") != _BACKEND["sharded_backend"]:
        raise ValueError(
            f"{backend} does not say sharded_backend torch_dist: not a checkpoint that can be read here"
        )
    try:
        with open(folder / INDEX, "rb") as file:
            index = _IndexUnpickler(file).load()
            index.state_dict_metadata, index.storage_data  # noqa: B018 - absent in another pickle
            return index
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {INDEX}: the checkpoint was never finished, or copied without it"
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{folder / INDEX} is not a checkpoint's index ({error}): copy it again"
        ) from error


class _Slice(io.RawIOBase):
    """A run of bytes of a file, as a file: for zipfile, which reads only what it needs."""

    def __init__(self, file: InputFile, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        count = left if count < 0 else min(count, left)
        self.at += count
        return self.file.read(self.offset + self.at - count, count)


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}


class _BlobUnpickler(pickle.Unpickler):
    """Reads what torch.save writes for one plain tensor, but its data: (dtype, offset, shape, stride)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, shape, stride, *_: (
                dtype,
                offset,
                tuple(shape),
                tuple(stride),
            )
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        if (kind, key) != ("storage", "0"):
            raise pickle.UnpicklingError("it holds more than one tensor")
        return dtype


def _locate_blob(file: InputFile, chunk: Chunk) -> FileTensor:
    try:
        with zipfile.ZipFile(_Slice(file, chunk.offset, chunk.length)) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            dtype, first, shape, stride = _BlobUnpickler(
                io.BytesIO(archive.read(entries["data.pkl"]))
            ).load()
            data = entries["data/0"]
            if data.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("its data is compressed")
        lengths = file.read(chunk.offset + data.header_offset + 26, 4)
        name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        start = chunk.offset + data.header_offset + 30 + name + extra
    except (
        zipfile.BadZipFile,
        KeyError,
        pickle.UnpicklingError,
        EOFError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{file.path}: no tensor at byte {chunk.offset} ({error}): copy it again"
        ) from error
    return FileTensor(file, start + first * dtype.itemsize, dtype, shape, stride)


class _Checksummed:
    """What torch.save needs of a file, and the file's size and checksum as they grow."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.info = file, FileInfo(0, 0)

    def write(self, data: Any) -> int:
        self.info = FileInfo(self.info.bytes + len(data), zlib.crc32(data, self.info.crc32))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, Box, Tensor]]
) -> tuple[list[tuple[str, Chunk]], FileInfo]:
    """Write blocks of global tensors as one file of a folder: where each came to lie, and the file's checksum."""
    written = []
    with open(path, "wb") as raw:
        file = _Checksummed(raw)
        for key, box, tensor in tensors:
            start = file.info.bytes
            torch.save(tensor.contiguous(), file)
            written.append((key, Chunk(box, path.name, start, file.info.bytes - start)))
    return written, file.info


def finish_folder(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    empty_objects: Iterable[str],
    common: dict[str, Any],
) -> None:
    """Write what makes files of tensors a checkpoint: objects that are None, common state, and the index last."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    state: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, tensor in tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            offsets = torch.Size(start for start, _ in chunk.box)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(b - a for a, b in chunk.box)))
            storage[MetadataIndex(key, offsets)] = _StorageInfo(
                chunk.file, chunk.offset, chunk.length
            )
        state[key] = TensorStorageMetadata(
            TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks
        )
    objects = "__0_objects.distcp"
    with open(folder / objects, "wb") as file:
        for key in empty_objects:
            start = file.tell()
            torch.save([None], file)
            state[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(objects, start, file.tell() - start)
    torch.save(common, folder / COMMON)
    (folder / BACKEND).write_text(json.dumps(_BACKEND))
    with open(folder / INDEX, "wb") as file:
        pickle.dump(Metadata(state, planner_data=None, storage_data=storage), file)
