"""Shared memory between the ranks that send to a destination and the engines that read it.

Invariant: a slot is overwritten only when every reader has taken what was in it, and read only when
every sender has filled it; each wait has a deadline that names who is waited for, and ends before
it where a reader's process has. The file is
unlinked as soon as all have opened it, so that its memory goes with its processes, however they
end.

On GPUs the slots are device memory that processes on one GPU share by CUDA IPC, and the rest stays
in the file.

File: digest, padded | filled [senders] | taken [readers] | fingerprint table [senders, rows, 2] |
slots. Counters are numbers of buckets since the ring was made. The table holds (policy version,
fingerprint) of each copy of a sync.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from rlhf3d.resharding.setup import FILE_PREFIX, RING_HEADER_BYTES, SLOTS, RingShape

# Policy versions count from 0.
_NEVER = -1
FIRST_PAUSE_S = 2e-5
PAUSE_GROWTH = 1.2
"""Pauses grow with the wait: the last one is at most a sixth of it."""
_LONGEST_PAUSE_S, LONGEST_PAUSE_ON_GPU_S = 1e-3, 1e-4
"""Between two looks at a counter.

On GPUs the host has cores to look more often, and buckets take less time.
"""
_SETTLING_S = 60.0
_LOOK_S = 1.0
"""Between two looks at whether the processes that are waited for still live."""
_FLOCK = "@hhqqi4x"
"""Of fcntl(2): l_type, l_whence, l_start, l_len, l_pid."""


class SyncError(RuntimeError):
    """A weight sync did not deliver what the plan promises; the message names tensor or process."""


class Ring:
    """One process's mapping of the file."""

    def __init__(self, shape: RingShape, path: Path, fd: int) -> None:
        self.shape, self.path, self._fd = shape, path, fd
        self._mmap = mmap.mmap(fd, shape.total_bytes)
        # Through numpy, the mapping counts its views and refuses to close under them.
        self._bytes = torch.from_numpy(np.frombuffer(self._mmap, dtype=np.uint8))
        senders, readers = len(shape.senders), len(shape.readers)
        self._digest = self._numbers(0, 1)
        # As numpy's: they are looked at again and again, and torch takes longer for a few numbers.
        self._filled = self._numbers(RING_HEADER_BYTES, senders).numpy()
        self._taken = self._numbers(RING_HEADER_BYTES + 8 * senders, readers).numpy()
        self._table = self._numbers(shape.table_offset, 2 * senders * shape.rows).view(
            senders, shape.rows, 2
        )
        self._slots = self._bytes[shape.slots_offset :]

    @classmethod
    def create(cls, shape: RingShape) -> Ring:
        """Make the file, all its memory reserved.

        Raises OSError that says how much memory it needs.
        """
        # First: what killed runs left may be the memory that this one lacks.
        _remove_abandoned()
        path = shape.path()
        # O_EXCL: a file of this name is another stream's. 0600: readers unpickle from it.
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Lasts as long as the process, however that ends: see `_remove_abandoned`.
            fcntl.flock(fd, fcntl.LOCK_SH)
            # Without it a full /dev/shm shows only at the first write, as SIGBUS.
            os.posix_fallocate(fd, 0, shape.total_bytes)
            ring = cls(shape, path, fd)
        except OSError as error:
            os.close(fd)
            os.unlink(path)
            raise OSError(
                error.errno,
                f"{path} needs {shape.total_bytes / 2**20:.0f} MiB of shared memory "
                f"({error.strerror}): free or enlarge it (docker run --shm-size), or lower "
                "rollout.sync_bucket_mib",
            ) from error
        if shape.on_gpu:
            try:
                ring._slots = _share_gpu_memory(SLOTS * shape.slot_stride, ring._slots)
            except Exception:  # the GPU is full
                # It is unmapped later, with the error: the frames of that look into it.
                ring.unlink()
                raise
        ring._digest.fill_(shape.digest)
        ring._filled[:] = 0
        ring._taken[:] = 0
        ring._table.fill_(_NEVER)
        return ring

    @classmethod
    def open(cls, shape: RingShape) -> Ring:
        """Map the file that another process made.

        Raises SyncError when it was made for another plan.
        """
        path = shape.path()
        fd = os.open(path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_SH)
        # Before mapping: a file that is too short fails there without saying why.
        if os.fstat(fd).st_size != shape.total_bytes:
            os.close(fd)
            raise SyncError(f"{path} was made for another plan: its size differs")
        ring = cls(shape, path, fd)
        if int(ring._digest) != shape.digest:
            ring.close()
            raise SyncError(f"{path} was made for another plan: its digest differs")
        if shape.on_gpu:
            ring._slots = _open_gpu_memory(ring._slots)
        return ring

    def hold(self, reader: int) -> None:
        """Show that a reader's process lives: the kernel takes this back when the process ends.

        A lock on a byte of the file, which locks nothing: it is of this opening of the file, and so
        a reader may be in its sender's own process.
        """
        lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, reader, 1, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)

    def _is_held(self, reader: int) -> bool:
        """Whether another opening of the file holds a reader's lock."""
        lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, reader, 1, 0)
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, lock)
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    def slot(self, number: int) -> torch.Tensor:
        """Memory of bucket `number` (counted since the ring was made), uint8 [slot_bytes]."""
        start = number % SLOTS * self.shape.slot_stride
        return self._slots[start : start + self.shape.slot_bytes]

    def wait_free(self, number: int, deadline: float) -> None:
        """Wait until every reader has taken what was in the slot of bucket `number`."""
        # Bucket number - SLOTS lay in this slot; the first SLOTS buckets need not wait.
        self._wait(
            lambda: int(self._taken.min()) > number - SLOTS, "read", number - SLOTS, deadline
        )

    def fill(self, sender: int, number: int) -> None:
        """`sender` has put its part into bucket `number`."""
        self._finish_copies()
        # After the data: a reader looks at the slot as soon as it sees this.
        self._filled[sender] = number + 1

    def wait_filled(self, number: int, deadline: float) -> None:
        """Wait until every sender has filled bucket `number`."""
        self._wait(lambda: int(self._filled.min()) > number, "filled", number, deadline)

    def record(self, sender: int, rows: Sequence[int], table: torch.Tensor) -> None:
        """Write down (policy version, fingerprint) [copies, 2] of these copies of `sender`."""
        self._table[sender, list(rows)] = table.cpu()  # a message's may be on a GPU

    def recorded(self, sender: int, rows: Sequence[int]) -> list[list[int]]:
        """[policy version, fingerprint] of these copies of `sender`.

        Version -1 when one was never sent.
        """
        found: list[list[int]] = self._table[sender, list(rows)].tolist()
        return found

    def take(self, reader: int, number: int) -> None:
        """`reader` is done with bucket `number`."""
        self._finish_copies()
        self._taken[reader] = number + 1

    def unlink(self) -> None:
        """Remove the file's name; its memory is freed when the last process has closed it."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap.

        Raises BufferError while a view is alive, which would otherwise become a dangling pointer.
        """
        if self._mmap.closed:
            return
        # mmap counts the tensors that look into it: all of ours must go first.
        nothing = torch.empty(0)
        self._slots = self._bytes = self._table = self._digest = nothing
        self._filled = self._taken = nothing.numpy()
        self._mmap.close()
        os.close(self._fd)

    def _finish_copies(self) -> None:
        """On a GPU copies are only queued; another process may not be told before they have run."""
        if self.shape.on_gpu:
            torch.cuda.current_stream().synchronize()

    def _numbers(self, offset: int, count: int) -> torch.Tensor:
        return self._bytes[offset : offset + 8 * count].view(torch.int64)

    def _wait(self, done: Callable[[], bool], what: str, number: int, deadline: float) -> None:
        pause_s = FIRST_PAUSE_S
        longest_s = LONGEST_PAUSE_ON_GPU_S if self.shape.on_gpu else _LONGEST_PAUSE_S
        look_at = time.monotonic() + _LOOK_S
        while not done():
            if what == "read" and time.monotonic() > look_at:
                self._check_readers(number)
                look_at = time.monotonic() + _LOOK_S
            if time.monotonic() > deadline:
                raise SyncError(
                    f"sync_weights: bucket {number} was not {what} in time by "
                    f"{', '.join(self._late(what, number))}; raise rollout.sync_timeout_s if the "
                    "weights are really that large, or look into logs/"
                )
            time.sleep(pause_s)
            pause_s = min(PAUSE_GROWTH * pause_s, longest_s)

    def _check_readers(self, number: int) -> None:
        """Raise SyncError where a reader of bucket `number` will never take it."""
        for reader, (name, taken) in enumerate(
            zip(self.shape.readers, self._taken.tolist(), strict=True)
        ):
            if taken <= number and not self._is_held(reader):
                raise SyncError(f"sync_weights: {name} ended before it had read bucket {number}")

    def _late(self, what: str, number: int) -> list[str]:
        """The processes that have not yet "filled" or "read" bucket `number`."""
        if what == "filled":
            counts, names = self._filled, self.shape.senders
        else:
            counts, names = self._taken, self.shape.readers
        counted = zip(names, counts.tolist(), strict=True)
        return [name for name, count in counted if count <= number]


def _share_gpu_memory(num_bytes: int, handle: torch.Tensor) -> torch.Tensor:
    """Memory on the current GPU; its pickled IPC handle is written to `handle`."""
    memory = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    # What torch.multiprocessing itself sends for a CUDA tensor: the IPC handle and how to open it.
    pickled = pickle.dumps(reduce_tensor(memory))
    assert len(pickled) + 8 <= handle.numel(), f"an IPC handle of {len(pickled)} bytes"
    # int64 length, then the pickle: its size varies, the room for it does not.
    handle[:8].view(torch.int64).fill_(len(pickled))
    handle[8 : 8 + len(pickled)] = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
    return memory


def _open_gpu_memory(handle: torch.Tensor) -> torch.Tensor:
    """The memory that another process on this GPU shared."""
    size = int(handle[:8].view(torch.int64))
    rebuild, arguments = pickle.loads(handle[8 : 8 + size].numpy().tobytes())
    # It is the maker's memory, valid while the maker keeps its own tensor: rings live equally long.
    memory: torch.Tensor = rebuild(*arguments)
    return memory


def _remove_abandoned() -> None:
    """Remove files that killed runs left: every process that has a ring open holds the shared lock.

    Files younger than a minute may be another process's that has not taken its lock yet.
    """
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        for path in folder.glob(f"{FILE_PREFIX}*"):
            try:
                if time.time() - path.stat().st_mtime < _SETTLING_S:
                    continue
                fd = os.open(path, os.O_RDWR)
            except (FileNotFoundError, PermissionError):
                continue
            try:
                # Fails at once where any process still holds the shared lock.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)
