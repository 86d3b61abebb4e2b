"""What is written comes back, its size and checksum are known, and the disk begins at once."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_the_disk_has_each_large_part_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(
        disk, "_sync_file_range", lambda _, start, count, how: begun.append((start, count))
    )
    file, size = NewFile(tmp_path / "f"), disk.PART_BYTES
    file.write(b"head")
    file.write(bytes(size + MIB))
    file.write(bytes(size))
    file.write(b"tail")
    file.sync()
    assert begun == [(0, size + 4), (size + 4, MIB + size)]  # the rest goes with fsync


def test_a_hint_that_the_system_refuses_changes_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()  # nothing to write back
    with open(reading, "rb"), open(writing, "wb") as file:
        start_writing(file, 0, MIB)


def test_a_full_disk_is_an_error() -> None:
    file = NewFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device"):
        file.write(b"x")
    file.close()
