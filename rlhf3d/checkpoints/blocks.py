"""Blocks of tensors in files, and safetensors files as streams of them.

Invariant: only the bytes asked for are read, straight into the caller's memory, from any thread; a file that is
shorter than it says is named in the error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf3d.models.boxes import Box
from rlhf3d.models.folder import TensorInfo
from rlhf3d.models.hf_io import copy_in_range

BLOCK_BYTES = 16 << 20
"""How much a copy holds in memory at a time."""
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""By the name a safetensors header gives them."""


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class InputFile:
    """A file read at any offset by any thread; open only while it is read, since a checkpoint can have thousands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.size = os.fstat(file.fileno()).st_size

    def _open(self) -> FileIO:
        try:
            return FileIO(self.path)
        except OSError as error:
            raise ValueError(f"cannot read {self.path} ({error.strerror})") from error

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` from `offset` on."""
        done = 0
        with self._open() as file:
            while done < len(target):
                count = os.preadv(file.fileno(), [target[done:]], offset + done)
                if count == 0:
                    end = offset + len(target)
                    raise ValueError(
                        f"{self.path} is cut off: it has {self.size} bytes, {end} are needed"
                    )
                done += count

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes from `offset` on."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)


@dataclass(frozen=True)
class FileTensor:
    """A tensor inside a file: element 0 at byte `start`, `stride` in elements."""

    file: InputFile
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read_into(self, box: Box, out: Tensor) -> None:
        """Copy the block `box` into `out` (its shape, any stride, any dtype)."""
        first = sum(a * step for (a, _), step in zip(box, self.stride, strict=True))
        span = 1 + sum((b - 1 - a) * step for (a, b), step in zip(box, self.stride, strict=True))
        direct = out.dtype == self.dtype and out.is_contiguous() and span == out.numel()
        buffer = torch.empty(0, dtype=self.dtype) if direct else torch.empty(span, dtype=self.dtype)
        block = (out.view(-1) if direct else buffer).as_strided(
            [b - a for a, b in box], self.stride
        )
        if direct and not block.is_contiguous():  # as many elements, in another order
            direct, buffer = False, torch.empty(span, dtype=self.dtype)
            block = buffer.as_strided(block.shape, self.stride)
        self.file.read_into(
            raw(out if direct else buffer), self.start + first * self.dtype.itemsize
        )
        if not direct:
            copy_in_range(out, block, f"{self.file.path} holds a value")


def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor stored row by row."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def row_blocks(
    shape: tuple[int, ...], itemsize: int, limit_bytes: int = BLOCK_BYTES
) -> Iterator[Box]:
    """`shape` cut along its first dimension into boxes of at most `limit_bytes` (and at least one row)."""
    if not shape:
        yield ()
        return
    rows, *rest = shape
    step = max(1, limit_bytes // (itemsize * prod(rest)))
    for start in range(0, rows, step):
        yield ((start, min(rows, start + step)), *((0, size) for size in rest))


def file_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, FileTensor]:
    """Tensors of safetensors files, to be read block by block."""
    files = {path: InputFile(path) for path in {info.file for info in tensors.values()}}
    return {
        name: FileTensor(
            files[info.file], info.start, DTYPES[info.dtype], info.shape, row_strides(info.shape)
        )
        for name, info in tensors.items()
    }


def safetensors_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length and header of a file with these tensors, their data in this order."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
