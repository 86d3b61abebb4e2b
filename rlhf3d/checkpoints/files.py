"""Many files written at once into a folder that appears whole or not at all, and goes on where a killed writer stopped.

Invariant: a file under its final name is complete and on the disk; the destination is renamed into place when all are.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.manifest import sync_folder

PLAN = "conversion.json"
LOCK = ".lock"
PARTS = ".parts"
"""Folder of notes that the finished files' writers leave for the end."""
SPARE_BYTES = 64 << 20
"""Of headers, configuration and tokenizer."""

Advance = Callable[[int], None]
"""Told how many more bytes were written; raises Stopped when the work is to end."""


class Stopped(RuntimeError):
    """Another file failed, or the user interrupted."""


@dataclass(frozen=True)
class FileTask:
    """One file: its name in the folder, its bytes (of tensors), and what writes it to the path it is given."""

    name: str
    num_bytes: int
    write: Callable[[Path, Advance], None]


def partial_folder(destination: Path) -> Path:
    """Where a destination is built."""
    return destination.parent / f".{destination.name}.partial"


@contextmanager
def building(destination: Path, plan: Mapping[str, Any], restart: bool) -> Iterator[Path]:
    """The folder to build `destination` in, renamed into place at the end; another's with the same plan is taken over.

    Raises ValueError where the destination exists, is being built by another process, or was begun by another plan.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists; remove it or choose another folder to write to")
    partial = partial_folder(destination)
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {destination}; wait for it") from error
        text = json.dumps(plan, indent=1)
        if (partial / PLAN).is_file() and (partial / PLAN).read_text() != text:
            raise ValueError(
                f"{partial} holds what an interrupted conversion of another source, or with other options, has "
                f"written: repeat that command, or begin anew with --restart"
            )
        (partial / PLAN).write_text(text)
        try:
            yield partial
        except BaseException:
            if {path.name for path in partial.iterdir()} <= {PLAN, LOCK}:  # nothing to go on from
                shutil.rmtree(partial)
            raise
        for own in (PLAN, LOCK):
            (partial / own).unlink()
        for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            sync_folder(folder)
        os.rename(partial, destination)
        sync_folder(destination.parent)
        shutil.rmtree(destination / PARTS, ignore_errors=True)


def write_files(folder: Path, tasks: list[FileTask], workers: int, on_bytes: Advance) -> None:
    """Write the files that are not there yet, `workers` at a time. The first failure stops the others and is raised.

    Raises ValueError beforehand where they do not fit on the disk.
    """
    missing = [task for task in tasks if not (folder / task.name).is_file()]
    needed, free = (
        sum(task.num_bytes for task in missing) + SPARE_BYTES,
        shutil.disk_usage(folder).free,
    )
    if needed > free:
        raise ValueError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB are needed: "
            f"free some, or write to another disk"
        )
    on_bytes(sum(task.num_bytes for task in tasks) - sum(task.num_bytes for task in missing))
    stop = threading.Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise Stopped("another file failed, or the user interrupted")
        on_bytes(count)

    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_write_file, folder / task.name, task, advance) for task in missing}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            _cancel(running)
            raise


def _cancel(running: set[Future[None]]) -> None:
    for future in running:
        future.cancel()


def _write_file(path: Path, task: FileTask, advance: Advance) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        task.write(unfinished, advance)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.rename(unfinished, path)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path} ({error.strerror or error}): mend that and repeat the command"
        ) from error
