"""Run a function on N forked ranks: import once, fork, collect what each rank returns.

Invariant: when `run_ranks` returns or raises, none of its children is alive; a child dies with its
parent. Fork only from a process without process groups; set `OMP_NUM_THREADS=1` when cores are few.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import IO, Any, NoReturn

import torch
from torch.distributed import TCPStore

_PR_SET_PDEATHSIG = 1
_serving: list[TCPStore] = []  # until the rank ends
_WATCHDOG_GRACE_S = 5.0  # a rank's own watchdog fires first, so that its stack is in the error


class RankError(RuntimeError):
    """A rank raised, died or ran past the deadline; the message holds its traceback."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Fork `world_size` ranks, call `fn(rank, port, *args)` on each; results in rank order.

    Results are pickled.

    `port` is where rank 0 serves a store for the rendezvous at 127.0.0.1; `RANK`, `LOCAL_RANK`,
    `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are set too. Raises RankError with the traceback
    of the rank that failed first, or with every unfinished rank's stacks after `timeout_s`.
    """
    # Open until rank 0 has taken it over: a port that was free a moment ago may be somebody's now.
    meeting = socket.create_server(("127.0.0.1", 0), backlog=1024)
    parent = os.getpid()
    pids: list[int] = []
    pipes: list[int] = []
    stacks: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(world_size)]  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for rank in range(world_size):
            read_end, write_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                _child(
                    rank, world_size, meeting, parent, write_end, stacks[rank], timeout_s, fn, args
                )
            os.close(write_end)
            pids.append(pid)
            pipes.append(read_end)
        meeting.close()  # so that nobody waits in its queue when rank 0 is no more
        return _collect(pids, pipes, stacks, time.monotonic() + timeout_s + _WATCHDOG_GRACE_S)
    finally:
        meeting.close()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is still ours
            os.waitpid(pid, 0)
        for pipe in pipes:
            os.close(pipe)
        for file in stacks:
            file.close()


def _child(
    rank: int,
    world_size: int,
    meeting: socket.socket,
    parent: int,
    pipe: int,
    stacks: IO[bytes],
    timeout_s: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> NoReturn:
    """Life of one rank: watchdogs, the call, one pickled (ok, value) on `pipe`."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stacks)
        port = int(meeting.getsockname()[1])
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update(
            {name: str(value) for name, value in env.items()}, MASTER_ADDR="127.0.0.1"
        )
        torch.set_num_threads(1)
        try:
            if rank == 0:
                _serving.append(_host(meeting, timeout_s))
            else:
                meeting.close()
            reply = pickle.dumps((True, fn(rank, port, *args)))
            status = 0
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(pipe, "wb") as out:
            out.write(reply)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _host(meeting: socket.socket, timeout_s: float) -> TCPStore:
    """Torch's store at `meeting`, which `init_process_group` of this process takes for its own."""
    return TCPStore(
        "127.0.0.1",
        int(meeting.getsockname()[1]),
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=meeting.detach(),
    )


def _collect(
    pids: list[int], pipes: list[int], stacks: list[IO[bytes]], deadline: float
) -> list[Any]:
    """Read every rank's reply until end of file.

    The first reply that is no success ends the wait.
    """
    world_size = len(pipes)
    received = [bytearray() for _ in pipes]
    results: dict[int, Any] = {}
    with selectors.DefaultSelector() as selector:
        for rank, pipe in enumerate(pipes):
            selector.register(pipe, selectors.EVENT_READ, rank)
        while len(results) < world_size:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [rank for rank in range(world_size) if rank not in results]
                raise RankError(f"ranks {late} of {world_size} gave no result in time")
            for key, _ in ready:
                rank = key.data
                chunk = os.read(pipes[rank], 1 << 20)
                received[rank] += chunk
                if chunk:
                    continue
                selector.unregister(pipes[rank])
                if not received[rank]:
                    raise RankError(_post_mortem(rank, pids[rank], stacks, results))
                ok, value = pickle.loads(bytes(received[rank]))
                if not ok:
                    raise RankError(f"rank {rank} of {world_size} failed first:\n{value}")
                results[rank] = value
    return [results[rank] for rank in range(world_size)]


def _post_mortem(rank: int, pid: int, stacks: list[IO[bytes]], results: dict[int, Any]) -> str:
    """What is known about a rank that ended without a reply.

    Its status and what the watchdogs wrote.
    """
    time.sleep(0.5)  # ranks that hang together reach their watchdogs together
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    status = info.si_status if info else "?"
    text = [f"rank {rank} of {len(stacks)} ended without a result (status {status})"]
    for other, file in enumerate(stacks):
        file.seek(0)
        dump = file.read().decode(errors="replace")
        if dump and other not in results:
            text.append(f"--- stacks of rank {other} at the deadline ---\n{dump}")
    return "\n".join(text)
