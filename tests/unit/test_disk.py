"""What is written comes back, its size and checksum are known, and the disk begins at once."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from rlhf3d import disk
from rlhf3d.checkpoints.manifest import FileInfo, file_info
from rlhf3d.disk import NewFile, start_writing
from rlhf3d.units import MIB


def test_size_and_checksum_are_those_of_the_file(tmp_path: Path) -> None:
    parts = [os.urandom(size) for size in (1, 0, 5000, 2 * disk.PART_BYTES + 3, 7)]
    file = NewFile(tmp_path / "f")
    places = []
    for part in parts:
        places.append(file.tell())
        assert file.write(memoryview(part)) == len(part)
    file.sync()
    file.sync()  # a second time does nothing
    assert (tmp_path / "f").read_bytes() == b"".join(parts)
    assert FileInfo(file.num_bytes, file.crc32) == file_info(tmp_path / "f")
    assert places == [0, 1, 1, 5001, 5001 + len(parts[3])]


def cached_pages(path: Path) -> int:
    """How many pages of a file the kernel keeps in memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        found = (ctypes.c_ubyte * (len(pages) // mmap.PAGESIZE + 1))()
        address = ctypes.c_void_p(np.frombuffer(pages, np.uint8).ctypes.data)
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(pages)), found) == 0
    return sum(one & 1 for one in found)


def test_parts_go_past_the_kernels_cache(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(bytes(10 * mmap.PAGESIZE))
    assert cached_pages(tmp_path / "plain") == 10
    try:
        os.close(os.open(tmp_path / "plain", os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct writes")
    file = NewFile(tmp_path / "f")
    file.write(os.urandom(2 * disk.PART_BYTES + 100))
    file.sync()
    assert cached_pages(tmp_path / "f") <= 1  # the last, which is no complete block


def test_a_file_system_without_direct_writes_gets_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(
        disk, "_sync_file_range", lambda _, start, count, how: begun.append((start, count))
    )

    def open_without(path: str, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such mode")
        return opened(path, flags, mode)

    opened = os.open
    monkeypatch.setattr(disk.os, "open", open_without)
    data, size = os.urandom(2 * disk.PART_BYTES + 4), disk.PART_BYTES
    file = NewFile(tmp_path / "f")
    file.write(data)
    file.sync()
    assert (tmp_path / "f").read_bytes() == data and file.crc32 == zlib.crc32(data)
    assert begun == [(0, size), (size, size)]  # the disk has each part at once


def test_a_hint_that_the_system_refuses_changes_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()  # nothing to write back
    with open(reading, "rb"), open(writing, "wb") as file:
        start_writing(file, 0, MIB)


def test_a_full_disk_is_an_error() -> None:
    for written in (b"x", bytes(4 * disk.PART_BYTES)):
        file = NewFile(Path("/dev/full"))
        with pytest.raises(OSError, match="No space left on device") as caught:
            file.write(written)
            file.sync()
        assert caught.value.filename == "/dev/full"
        file.close()
