"""The ring hands on every bucket whole, to every reader, before it is overwritten; waits end and
name who is late.

Also proven: its memory is what its shape says and goes when its processes have gone; a file of
another plan, a full disk and a file that a killed run left are handled.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from support.ranks import run_ranks

from rlhf3d.resharding import ring as ring_module
from rlhf3d.resharding.ring import Ring, SyncError
from rlhf3d.resharding.setup import FILE_PREFIX, SLOTS, RingShape

SHAPE = RingShape(
    name="unset",
    senders=("training rank 0", "training rank 3"),
    readers=("engine 0 rank 1", "engine 2 rank 1"),
    rows=5,
    slot_bytes=1000,
    on_gpu=False,
    digest=0x1234567890ABCDE,
)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> Iterator[RingShape]:
    """A shape whose file no other test uses, and no file after the test."""
    named = replace(SHAPE, name=f"test-{os.getpid()}-{abs(hash(request.node.name))}")
    yield named
    named.path().unlink(missing_ok=True)


def test_shape_counts_every_byte(shape: RingShape) -> None:
    ring = Ring.create(shape)
    assert os.stat(shape.path()).st_size == shape.total_bytes
    assert (
        shape.table_offset >= 64 + 8 * 4 and shape.slots_offset >= shape.table_offset + 16 * 2 * 5
    )
    assert shape.total_bytes == shape.slots_offset + SLOTS * 1024
    assert os.stat(shape.path()).st_blocks * 512 >= shape.total_bytes, (
        "reserved, so that no write can fail later"
    )
    ring.slot(0).fill_(255)
    ring.slot(1).fill_(254)
    ring.record(1, [4, 2], torch.tensor([[7, -(2**63)], [8, 9]]))
    other = Ring.open(shape)
    assert (
        (other.slot(0) == 255).all()
        and (other.slot(3) == 254).all()
        and other.slot(2).numel() == 1000
    )
    assert other.recorded(1, [2, 4]) == [[8, 9], [7, -(2**63)]]
    versions = [[row[0] for row in other.recorded(sender, range(5))] for sender in range(2)]
    assert versions == [[-1] * 5, [-1, -1, 8, -1, 7]]
    ring.close()
    other.close()


def test_a_slow_reader_is_never_overwritten(shape: RingShape) -> None:
    """Two senders and two readers of different pace: every reader sees every bucket as both senders
    left it.
    """
    buckets = 40
    ring = Ring.create(shape)

    def send(sender: int) -> None:
        own = Ring.open(shape)
        for number in range(buckets):
            own.wait_free(number, soon())
            own.slot(number)[sender * 500 : sender * 500 + 500].fill_(number + 100 * sender)
            own.record(sender, [number % 5], torch.tensor([[number, number * 7]]))
            own.fill(sender, number)
        own.close()

    def read(reader: int) -> list[tuple[int, int, int]]:
        own, seen = Ring.open(shape), []
        own.hold(reader)
        for number in range(buckets):
            own.wait_filled(number, soon())
            for _ in range(
                10 * reader
            ):  # the second reader gives way again and again before it looks
                time.sleep(0)
            first, second = own.slot(number)[:500].unique(), own.slot(number)[500:].unique()
            assert first.numel() == second.numel() == 1
            seen.append((int(first), int(second), own.recorded(1, [number % 5])[0][1]))
            own.take(reader, number)
        own.close()
        return seen

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send, sender) for sender in range(2)]
        readers = [pool.submit(read, reader) for reader in range(2)]
        for sender in senders:
            sender.result(timeout=60)
        for reader in readers:
            assert reader.result(timeout=60) == [(n, n + 100, 7 * n) for n in range(buckets)]
    ring.close()


def read_and_die(name: str, reader: int, held: Event) -> None:
    """In a process: take bucket 0, and die at the second."""
    own = Ring.open(replace(SHAPE, name=name))
    own.hold(reader)
    held.set()
    own.take(reader, 0)
    own.wait_filled(1, soon())
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_sender_does_not_wait_for_a_reader_that_has_died(shape: RingShape) -> None:
    ring, living = Ring.create(shape), Ring.open(shape)
    living.hold(0)
    living.take(0, 0)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=read_and_die, args=(shape.name, 1, held))
    process.start()
    assert held.wait(60)
    for number in (0, 1):
        ring.wait_free(number, soon())
        ring.fill(0, number)
        ring.fill(1, number)
    ring.wait_free(2, soon())
    began = time.monotonic()
    with pytest.raises(SyncError, match="engine 2 rank 1 ended before it had read bucket 1"):
        living.take(0, 1)
        ring.wait_free(3, soon(60))
    assert time.monotonic() - began < 20
    process.join(30)
    living.close()
    ring.close()


def test_a_sender_waits_for_the_slowest_reader_and_a_reader_for_the_last_sender(
    shape: RingShape,
) -> None:
    ring = Ring.create(shape)
    ring.wait_free(0, soon())
    ring.wait_free(1, soon())  # two slots
    for number in (0, 1):
        ring.fill(0, number)
        ring.fill(1, number)
    ring.take(0, 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ring.wait_free, 2, soon())
        ring.take(0, 1)
        assert not waiting.done()
        ring.take(1, 0)
        waiting.result(timeout=30)
        ring.fill(1, 2)
        reading = pool.submit(ring.wait_filled, 2, soon())
        assert not reading.done()
        ring.fill(0, 2)
        reading.result(timeout=30)
    ring.close()


def test_deadlines_name_who_is_late(shape: RingShape) -> None:
    ring = Ring.create(shape)
    ring.fill(0, 0)
    with pytest.raises(
        SyncError,
        match=r"bucket 0 was not filled in time by training rank 3; raise rollout\.sync_t",
    ):
        ring.wait_filled(0, soon(0.01))
    ring.take(0, 0)
    with pytest.raises(SyncError, match=r"bucket 0 was not read in time by engine 2 rank 1;"):
        ring.wait_free(2, soon(0.01))
    with pytest.raises(
        SyncError, match=r"bucket 1 was not filled in time by training rank 0, training rank 3;"
    ):
        ring.wait_filled(1, soon(0.01))
    ring.close()


def test_a_file_for_another_plan_is_refused(shape: RingShape) -> None:
    ring = Ring.create(shape)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SyncError, match="made for another plan: its digest differs"):
        Ring.open(replace(shape, digest=shape.digest + 1))
    with pytest.raises(SyncError, match="made for another plan: its size differs"):
        Ring.open(replace(shape, slot_bytes=5000))
    assert len(os.listdir("/proc/self/fd")) == files, "refused files are closed"
    ring.close()


def test_a_name_in_use_is_refused(shape: RingShape) -> None:
    ring = Ring.create(shape)
    ring.slot(0).fill_(1)
    with pytest.raises(FileExistsError, match=FILE_PREFIX):
        Ring.create(shape)
    assert (ring.slot(0) == 1).all()
    ring.close()


def test_a_lack_of_memory_names_file_size_and_remedy(
    shape: RingShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    large = replace(shape, slot_bytes=3 << 20)
    with pytest.raises(
        OSError, match=r"needs 6 MiB of shared memory \(No space left.*shm-size.*sync_bucket_mib"
    ) as e:
        Ring.create(large)
    assert e.value.errno == errno.ENOSPC and not large.path().exists()


def test_a_full_gpu_leaves_no_file(shape: RingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(num_bytes: int, handle: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ring_module, "_share_gpu_memory", full)
    on_gpu = replace(shape, on_gpu=True)
    with pytest.raises(torch.OutOfMemoryError):
        Ring.create(on_gpu)
    assert not on_gpu.path().exists()


def test_abandoned_files_are_removed_and_others_kept(
    shape: RingShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = time.time() - 3600
    # Looked for in folders of this test only: no file of a run beside it is touched.
    in_use = Ring.create(replace(shape, name=f"{shape.name}-in-use"))
    abandoned = shape.path().with_name(f"{FILE_PREFIX}{shape.name}-abandoned")
    young = abandoned.with_name(f"{FILE_PREFIX}{shape.name}-young")
    stranger = abandoned.with_name(f"not-{FILE_PREFIX}{shape.name}")
    for path in (abandoned, young, stranger):
        path.write_bytes(b"x")
    for path in (abandoned, stranger, in_use.path):
        os.utime(path, (old, old))
    glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: (p for p in glob(self, pattern) if shape.name in p.name)
    )
    ring = Ring.create(shape)
    kept = [path.exists() for path in (abandoned, young, stranger, in_use.path)]
    for path in (young, stranger):
        path.unlink()
    in_use.unlink()
    in_use.close()
    ring.close()
    assert kept == [False, True, True, True]


def test_memory_goes_with_its_last_process(shape: RingShape) -> None:
    ring, other = Ring.create(shape), Ring.open(shape)
    ring.unlink()
    ring.unlink()
    assert not shape.path().exists()
    ring.slot(0).fill_(9)
    assert (other.slot(0) == 9).all(), "the mapping outlives the name"
    ring.close()
    ring.close()
    view = other.slot(1)
    with pytest.raises(BufferError):
        other.close()
    del view


def test_a_full_dev_shm_means_the_temporary_folder(
    shape: RingShape, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class NoRoom:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(ring_module, "_remove_abandoned", lambda: None)
    monkeypatch.setattr(os, "statvfs", lambda path: NoRoom)
    ring = Ring.create(replace(shape, slot_bytes=1 << 20))
    assert ring.path.parent == tmp_path
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    other = Ring.open(replace(shape, slot_bytes=1 << 20))  # found although /dev/shm has room by now
    assert other.path == ring.path
    ring.close()
    other.close()


def across_processes(rank: int, port: int, shape: RingShape) -> list[float]:
    """Rank 0 made the ring before the fork; it and rank 1 send, ranks 2 and 3 read."""
    ring, buckets, sums = Ring.open(shape), 25, []
    for number in range(buckets):
        if rank < 2:
            ring.wait_free(number, soon())
            ring.slot(number)[rank * 500 : rank * 500 + 500].fill_(number + rank)
            ring.fill(rank, number)
        else:
            ring.wait_filled(number, soon())
            sums.append(float(ring.slot(number).float().sum()))
            ring.take(rank - 2, number)
    ring.close()
    return sums


def test_processes_see_each_others_buckets(shape: RingShape) -> None:
    ring, readers = Ring.create(shape), (Ring.open(shape), Ring.open(shape))
    for number, reader in enumerate(readers):
        reader.hold(number)  # before any rank starts: on a busy machine one may come seconds later
    results = run_ranks(4, across_processes, shape, timeout_s=60)
    wanted = [500.0 * (2 * number + 1) for number in range(25)]
    assert results[2] == results[3] == wanted
    for one in (ring, *readers):
        one.close()


def test_waiting_leaves_the_core_to_others(shape: RingShape) -> None:
    ring = Ring.create(shape)
    done = threading.Event()

    def wait() -> tuple[float, float]:
        start, began = time.thread_time(), time.monotonic()
        ring.wait_filled(0, soon())
        done.set()
        return time.thread_time() - start, time.monotonic() - began

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        assert not done.wait(0.3)
        ring.fill(0, 0)
        ring.fill(1, 0)
        computed_s, waited_s = waiting.result(timeout=30)
        assert computed_s < waited_s / 5
    ring.close()
