"""A process that loads a function once and forks a process for each session, seen from both sides.

Invariant: what a session's process started, daemons included, ends with it, and what any of them
started ends with the zygote; the zygote ends with the thread that started it. A process is killed
by the zygote before it is reaped, so its number is never another's. After loading, the zygote runs
nothing of the user's. What the processes print goes through it, up to a limit (`output.py`).
Runs in: `Zygote` in the process that owns the pool; `serve_sessions` in the zygote, and from the
fork on in the session's process.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import inspect
import os
import secrets
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from rlhf3d.pool.output import Outputs
from rlhf3d.pool.process import (
    WorkerProcess,
    answer_calls,
    describe_exit,
    die_with,
    limit_memory,
    load_function_of,
)
from rlhf3d.processes import find_marked, ignore_stop_signals, stop_signals_blocked

MAX_REPLY_BYTES = 256 * 2**20
"""The owner of the pool holds a reply of each session at once."""
_SERVE = (
    "import sys; from rlhf3d.pool.zygote import serve_sessions; "
    "serve_sessions(*map(int, sys.argv[1:]))"
)
_MARK = "RLHF3D_SESSIONS_OF"
_MESSAGE = struct.Struct("=cqi")
"""What is asked or reported, the number of the session, an exit code or errno."""
_FORK, _STOP = b"F", b"S"
_FORKED, _NOT_FORKED, _ENDED = b"F", b"N", b"E"
_END_S = 3.0
"""How long the zygote waits for what it has killed."""
_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>


@dataclass(frozen=True)
class Report:
    """What the zygote says about a session's process."""

    number: int
    how_it_ended: str | None = None
    error: OSError | None = None
    """Why it could not be forked. With neither, it has been."""


class Zygote:
    """The zygote, for the one thread that started it; only `kill` may come from another."""

    def __init__(self, recipe: bytes) -> None:
        self._mark = secrets.token_hex(8)
        # Packets: a request is sent whole or not at all.
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        with theirs:
            self._process = WorkerProcess(recipe, _SERVE, [theirs.fileno()], {_MARK: self._mark})
        # A process that was forked while it loaded may hold `theirs`: no end of file tells its end.
        self.ended = os.pidfd_open(self._process.pid)
        """A file that can be read once the process has ended."""
        self._requests: deque[tuple[bytes, socket.socket | None]] = deque()

    def wait_until_ready(self, timeout_s: float, what: str) -> None:
        """Wait until it can fork; StartError where `what` does not load."""
        self._process.wait_until_ready(timeout_s, what)

    def fork(self, number: int) -> socket.socket:
        """Ask for the process of a session, which begins to read at the other end of the socket.

        OSError where this process may open no more files.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._requests.append((_MESSAGE.pack(_FORK, number, 0), theirs))
        return ours

    def stop(self, number: int) -> None:
        """Ask for the end of a session's process, and of all that it started."""
        self._requests.append((_MESSAGE.pack(_STOP, number, 0), None))

    def send(self) -> bool:
        """Send requests as far as this does not block; whether all are sent."""
        with suppress(BlockingIOError):
            while self._requests:
                message, end = self._requests[0]
                files = [] if end is None else [end.fileno()]
                try:
                    socket.send_fds(self.control, [message], files)
                except ConnectionError:  # it has ended, which `ended` says
                    return True
                self._requests.popleft()
                if end is not None:
                    end.close()
        return not self._requests

    def receive(self) -> Report | None:
        """A report, if there is one."""
        try:
            message = self.control.recv(_MESSAGE.size)
        except (BlockingIOError, ConnectionResetError):
            return None
        if not message:
            return None
        kind, number, value = _MESSAGE.unpack(message)
        if kind == _NOT_FORKED:
            return Report(number, error=OSError(value, os.strerror(value)))
        return Report(number, describe_exit(value) if kind == _ENDED else None)

    def kill(self) -> None:
        """Kill it, from any thread; `end` is still to be called."""
        self._process.kill()

    def end(self, grace_s: float) -> str:
        """Have it end everything within `grace_s`, or kill everything; how it ended."""
        self.control.close()
        for _, end in self._requests:
            if end is not None:
                end.close()
        self._requests.clear()
        code = self._process.end(grace_s)
        os.close(self.ended)
        if code != 0:  # the kernel has ended the sessions' processes, not what they started
            self._kill_marked()
        return describe_exit(code)

    def _kill_marked(self) -> None:
        # Again: what was just starting another process has been missed.
        for _ in range(10):
            found = find_marked(self._mark, _MARK)
            if not found:
                return
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=0.1)


def serve_sessions(file_descriptor: int, parent: int, control: int) -> None:
    """Load the function, say so, then fork sessions until the parent is gone."""
    os.set_inheritable(control, False)
    # Before it loads: what daemons its sessions leave behind are this process's children.
    _adopt_orphans()
    connection, loaded = load_function_of(file_descriptor, parent)
    if loaded is None:
        return
    for stream in (sys.stdout, sys.stderr):
        # The user may have put anything in their place. Sessions are killed, and have no time to
        # write what they print.
        with suppress(Exception):
            stream.flush()
            # With PYTHONUNBUFFERED a line and its end would be two writes, and other processes'
            # lines could come between them.
            stream.reconfigure(  # type: ignore[union-attr]
                line_buffering=True, write_through=False
            )
    # Objects that the collector never touches stay on pages that all sessions share.
    gc.collect()
    gc.freeze()
    forker = _Forker(socket.socket(fileno=control), connection, parent, *loaded)
    connection.send(None)
    forker.run()


class _Forker:
    """The zygote's own loop."""

    def __init__(
        self,
        control: socket.socket,
        connection: Connection[Any, Any],
        parent: int,
        function: Callable[[Any], Any],
        memory_gib: float | None,
    ) -> None:
        self._control, self._connection, self._parent = control, connection, parent
        self._function, self._memory_gib = function, memory_gib
        self._pids: dict[int, int] = {}
        """Process of each session's number."""
        self._numbers: dict[int, int] = {}
        """Number of each session's process."""
        self._pid, self._session = os.getpid(), os.getsid(0)
        self._loaded = set(_children())
        """Processes that the user's file started when it was loaded; any session may need them."""
        self._poll = select.poll()
        self._outputs = Outputs(self._poll)
        self._wake, self._wake_end = os.pipe()
        for end in (self._wake, self._wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        self._former = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # From here on it ends by itself when the parent has gone, and takes everything with it;
        # the kernel would kill this process alone. Any signal with a handler wakes it.
        die_with(parent, signal.SIGCHLD)

    def run(self) -> None:
        """Serve requests until the parent is gone, then end everything."""
        self._poll.register(self._control, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        with suppress(OSError):  # the other end has been closed
            while os.getppid() == self._parent:
                ready = {descriptor for descriptor, _ in self._poll.poll(self._outputs.wait_ms)}
                if self._wake in ready:
                    # What is left wakes it again. Before `_reap`: who ends during that does too.
                    os.read(self._wake, 4096)
                    self._reap()
                for end in filter(self._outputs.__contains__, ready):
                    self._outputs.pass_on(end)
                self._outputs.drop()
                if self._control.fileno() in ready and not self._serve():
                    break
        self._end()

    def _serve(self) -> bool:
        """Do what one request asks; false where no more will come."""
        message, files, _, _ = socket.recv_fds(
            self._control, _MESSAGE.size, 1, socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            return False
        kind, number, _ = _MESSAGE.unpack(message)
        if kind == _FORK:
            self._fork(number, files[0])
        elif number in self._pids:  # else it has ended, and that is reported
            _kill(self._pids[number])
        return True

    def _fork(self, number: int, end: int) -> None:
        try:
            pid = self._fork_with_output(number, end)
        except OSError as error:
            self._report(_NOT_FORKED, number, error.errno or errno.EAGAIN)
            return
        finally:
            os.close(end)
        self._pids[number], self._numbers[pid] = pid, number
        self._report(_FORKED, number, 0)

    def _fork_with_output(self, number: int, end: int) -> int:
        """The process that makes a session's calls, with a pipe to print into."""
        prints = self._outputs.begin(number)
        try:
            # Unblocked again by the child when it ignores them.
            with stop_signals_blocked():
                pid = os.fork()
                if pid == 0:
                    self._be_session(end, prints)
        except OSError:
            self._outputs.finish(number)
            raise
        finally:
            os.close(prints)
        return pid

    def _be_session(self, end: int, prints: int) -> None:
        """What the forked process does; it never returns."""
        code = 1
        try:
            # A session of its own: what it starts is killed with it.
            os.setsid()
            die_with(self._pid)
            _adopt_orphans()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, self._former)
            ignore_stop_signals()
            os.close(self._wake)
            os.close(self._wake_end)
            self._control.close()
            self._connection.close()
            self._outputs.take(prints)
            limit_memory(self._memory_gib)
            _new_random_state()
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            answer_calls(Connection(end), _waiting(self._function, loop), MAX_REPLY_BYTES)
            _close(self._function, loop)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Not `sys.exit`: handlers that were registered before the fork belong to the zygote,
            # such as one that deletes a temporary folder that all sessions use.
            os._exit(code)

    def _reap(self) -> None:
        """Report processes that have ended, and end what they started."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if ended is None:
                break
            pid = ended.si_pid
            if pid in self._numbers:
                _kill(pid)  # its process group, whose number is its own until it is reaped
            _, status = os.waitpid(pid, 0)
            self._loaded.discard(pid)
            if (number := self._numbers.pop(pid, None)) is not None:
                del self._pids[number]
                self._outputs.finish(number)
                self._report(_ENDED, number, os.waitstatus_to_exitcode(status))
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Kill what an ended session left behind; while it lived, it was their parent itself."""
        for pid in _children():
            if pid in self._numbers or pid in self._loaded:
                continue
            with suppress(ProcessLookupError):
                if os.getsid(pid) != self._session:  # else of the zygote's own
                    os.kill(pid, signal.SIGKILL)

    def _report(self, kind: bytes, number: int, value: int) -> None:
        self._control.send(_MESSAGE.pack(kind, number, value))

    def _end(self) -> None:
        give_up = time.monotonic() + _END_S
        while (children := _children()) and time.monotonic() < give_up:
            for pid in children:
                _kill(pid)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
            time.sleep(0.005)


def _adopt_orphans() -> None:
    """Be the parent of all descendants that lose theirs."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _children() -> list[int]:
    """Processes whose parent is this one; zombies too."""
    children: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            children += map(int, file.read_text().split())
    return children


def _kill(pid: int) -> None:
    """Kill a child and its process group."""
    # The group is there once the child has called setsid.
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _new_random_state() -> None:
    """Unlike Python's own, these generators go on from the zygote's state after a fork."""
    # Only if the user's file imported them.
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _waiting(function: Callable[[Any], Any], loop: asyncio.AbstractEventLoop) -> Callable[..., Any]:
    """`function`, and if it is async, its result."""

    def call(payload: Any) -> Any:
        value = function(payload)
        return _result(value, loop)

    return call


def _result(value: Any, loop: asyncio.AbstractEventLoop) -> Any:
    return loop.run_until_complete(value) if inspect.isawaitable(value) else value


def _close(function: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Call the function's own `close`, if it has one."""
    close = getattr(function, "close", None)
    if callable(close):
        _result(close(), loop)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
