"""Build a folder next to its final name, then rename it into place.

Invariant: the destination appears complete and on disk, or not at all. A build that fails or is
interrupted leaves nothing; what a killed process left is removed by the next build.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf3d.units import GIB, MIB

SPARE_BYTES = 64 * MIB
"""Room for what `num_bytes` does not count: headers, configuration, tokenizer."""


@contextmanager
def new_folder(destination: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Give the folder to build `destination` in, of about `num_bytes`; rename it at the end.

    Raises ValueError if the destination exists or the disk has no room, RuntimeError if a file
    cannot be written.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists; remove it or choose another folder to write to")
    # Before the room is checked: they may hold most of the disk.
    _remove_abandoned(destination)
    # Two processes never share this name: whichever renames second fails, and neither mixes
    # its files with the other's.
    partial = destination.with_name(f"{_stem(destination)}{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _check_room(partial, num_bytes)
        yield partial
        # Contents first, then the name: after a power cut a folder of that name is complete.
        sync_tree(partial)
        os.rename(partial, destination)
        sync(destination.parent)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {destination} ({error.strerror or error}): "
            "fix that and repeat the command"
        ) from error
    finally:
        # After the rename there is nothing of this name.
        shutil.rmtree(partial, ignore_errors=True)


def _stem(destination: Path) -> str:
    # With the host: on a shared disk a process id says nothing about another machine's.
    return f".{destination.name}.partial-{platform.node()}-"


def _remove_abandoned(destination: Path) -> None:
    """Remove the unfinished builds of processes of this machine that are no more."""
    if not destination.parent.is_dir():
        return
    stem = _stem(destination)
    for path in destination.parent.iterdir():
        process = path.name.removeprefix(stem)
        if path.name.startswith(stem) and process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        # Signal 0 sends nothing; it only asks whether the process is there.
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _check_room(folder: Path, num_bytes: int) -> None:
    needed, free = num_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if num_bytes and needed > free:
        raise ValueError(
            f"{folder.parent} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are needed: "
            "free some, or write to another disk"
        )


def sync_tree(folder: Path) -> None:
    """Put every file and every name below `folder` on disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Put a file's contents, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
