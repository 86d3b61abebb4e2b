"""Files that the disk is at work for while others compute.

Invariant: after `NewFile.sync` the contents are on disk, and `num_bytes` and `crc32` are theirs:
nothing is read again. Everything else here is a hint, without which only time is lost.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np

from rlhf3d.units import MIB

PART_BYTES = 8 * MIB
"""Checksummed and handed to the disk at a time."""
_PARTS = 2
"""Memory of a file: one part is filled while the disk takes the other."""
_BLOCK_BYTES = 4096
"""What the disk takes straight from memory is a multiple of it, in length and place."""
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE of Linux: begin, and do not wait."""


class NewFile:
    """A file that is checksummed, and goes to the disk, while it is written from the start.

    Past the kernel's cache where the file system has a way: filling that costs more processor time
    than all else here, a kernel left alone collects gigabytes in it, and who calls fsync waits for
    all of them. What cannot be written raises OSError at a later call, `sync` at the latest.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes, self.crc32 = path, 0, 0
        # Unbuffered: parts are collected here.
        self._file = open(path, "wb", buffering=0, opener=_opened)  # noqa: SIM115 - until `sync`
        # Mapped: direct writes want memory that begins with a page.
        self._free = deque(mmap.mmap(-1, PART_BYTES) for _ in range(_PARTS))
        self._filled = 0
        self._writing: deque[Future[mmap.mmap]] = deque()
        self._thread = ThreadPoolExecutor(1, "write")

    def write(self, data: bytes | memoryview) -> int:
        """Append a copy of `data`; its bytes, as Python's files return."""
        values = np.frombuffer(data, dtype=np.uint8)
        start = 0
        while start < len(values):
            if not self._free:
                self._free.append(self._writing.popleft().result())
            piece = values[start : start + PART_BYTES - self._filled]
            # By numpy, which lets other threads run meanwhile.
            part = np.frombuffer(self._free[0], dtype=np.uint8)
            part[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            start += len(piece)
            if self._filled == PART_BYTES:
                self._hand_over()
        self.num_bytes += len(values)
        return len(values)

    def tell(self) -> int:
        """Where the next bytes go."""
        return self.num_bytes

    def flush(self) -> None:
        """Do nothing, for those who expect a file of Python's: what is held back comes by parts."""

    def sync(self) -> None:
        """Wait until the contents are on disk, and close, whether they could be written or not."""
        if self._file.closed:
            return
        try:
            if self._filled:
                self._hand_over()
            while self._writing:
                self._writing.popleft().result()
            os.fsync(self._file.fileno())
        finally:
            self.close()

    def close(self) -> None:
        """Close a file; without `sync`, one that is not to be used."""
        self._thread.shutdown()
        self._file.close()
        self._free.clear()

    def _hand_over(self) -> None:
        """Have the thread write what is filled of the first free part."""
        part, count, self._filled = self._free.popleft(), self._filled, 0
        self._writing.append(self._thread.submit(self._put, part, count))

    def _put(self, part: mmap.mmap, count: int) -> mmap.mmap:
        """Checksum and write the first `count` bytes of a part; the part, to be used again."""
        values = memoryview(part)[:count]
        self.crc32 = zlib.crc32(values, self.crc32)
        if count % _BLOCK_BYTES:  # the file's last: no more than its bytes, by way of the cache
            _write_cached(self._file)
        begun = self._file.tell()
        try:
            while values:
                # A system call writes what there is room for, and says at the next that it is full.
                values = values[self._file.write(values) :]
        except OSError as error:  # a descriptor does not know the name of its file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        start_writing(self._file, begun, count)
        return part


def _opened(path: str, flags: int) -> int:
    """A file that is written to past the kernel's cache, where the file system can."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_cached(file: IO[bytes]) -> None:
    """From here on a file takes lengths of any number of bytes."""
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)


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
