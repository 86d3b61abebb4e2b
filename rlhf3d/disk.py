"""Files that the disk is at work for while others compute.

Invariant: after `NewFile.sync` the contents are on disk, and `num_bytes` and `crc32` are theirs:
nothing is read again. Everything else here is a hint, without which only time is lost.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from pathlib import Path
from typing import IO

from rlhf3d.units import MIB

PART_BYTES = 8 * MIB
"""Checksummed, written and handed to the disk at a time."""
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of Linux: begin, and do not wait."""


class NewFile:
    """A file that is checksummed, and on its way to the disk, while it is written from the start.

    Left alone, a kernel collects gigabytes in memory, and who calls fsync waits for all of them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes, self.crc32 = path, 0, 0
        self._begun = 0
        # Unbuffered: what is written in large parts needs no second copy.
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - until `sync`

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`; its bytes, as Python's files return."""
        values = memoryview(data).cast("B")
        for start in range(0, len(values), PART_BYTES):
            self._append(values[start : start + PART_BYTES])
        return len(values)

    def tell(self) -> int:
        """Where the next bytes go."""
        return self.num_bytes

    def flush(self) -> None:
        """Do nothing, for those who expect a file of Python's: nothing is held back."""

    def sync(self) -> None:
        """Wait until the contents are on disk, and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def close(self) -> None:
        """Close a file that is not to be used."""
        self._file.close()

    def _append(self, part: memoryview) -> None:
        self.crc32 = zlib.crc32(part, self.crc32)
        rest = part
        while rest:
            # A system call writes what there is room for, and says at the next that it is full.
            written = self._file.write(rest)
            rest = rest[written:]
        self.num_bytes += len(part)
        if self.num_bytes - self._begun >= PART_BYTES:
            start_writing(self._file, self._begun, self.num_bytes - self._begun)
            self._begun = self.num_bytes


def start_writing(file: IO[bytes], start: int, num_bytes: int) -> None:
    """Have the disk begin with a part of a file that was written, if it is worth a request."""
    if num_bytes >= MIB and _sync_file_range is not None:
        _sync_file_range(file.fileno(), start, num_bytes, _WRITE)


def start_reading(file: IO[bytes], start: int, num_bytes: int) -> None:
    """Have the disk begin with a part of a file that will be looked at through a mapping."""
    # In parts: of each request the kernel reads about as much as one command of the disk takes.
    for place in range(start, start + num_bytes, MIB):
        os.posix_fadvise(file.fileno(), place, MIB, os.POSIX_FADV_WILLNEED)


def _find_sync_file_range() -> ctypes._NamedFuncPointer | None:
    """The C library's function, which Python has not; None where there is none."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_sync_file_range = _find_sync_file_range()
