"""What the processes of sessions print, on its way to standard error.

Invariant: of each process at most `EACH_BYTES` are written, and of all of them together
`ALL_BYTES`; that it was cut is said once for each process. The rest is taken and dropped, in large
parts and not at once, so that a process that prints without end costs the others next to nothing.
Standard error that takes nothing holds nobody up for longer than `_STUCK_S`.
Runs in: the zygote.
"""

from __future__ import annotations

import fcntl
import os
import select
import time
from contextlib import suppress
from dataclasses import dataclass

from rlhf3d.processes import allow_open_files

EACH_BYTES = 64 * 2**10
"""A long traceback or two; also what a pipe holds."""
ALL_BYTES = 64 * 2**20
"""Of one zygote: about a thousand processes that print all they may."""
CUT = (
    "\n[what this process prints is left out from here on: of each at most "
    f"{EACH_BYTES // 2**10} KiB are shown, of all {ALL_BYTES // 2**20} MiB, and nothing where "
    "standard error takes no more]\n"
)
_PIPE_BYTES = 2**20
"""What the pipe of a process holds whose output is dropped, if the system allows it."""
_DROP_EVERY_S = 0.02
_LAST_READS = 4
"""Reads of what an ended process has left in its pipe."""
_STUCK_S = 1.0
_STDERR = 2


@dataclass
class _Output:
    """Of one process."""

    end: int
    """Where it is read; -1 once it is closed, as another pipe may then have its number."""
    written: int = 0
    cut: bool = False
    said: bool = False
    """That it was cut."""


class Outputs:
    """The pipes into which processes print, by the numbers of their sessions."""

    def __init__(self, poll: select.poll) -> None:
        """`poll` is told what to wait for."""
        self._poll = poll
        self._outputs: dict[int, _Output] = {}
        self._numbers: dict[int, int] = {}
        """Session of each end that is read."""
        self._written = 0
        self._stuck = False
        self._cut: dict[int, None] = {}
        """Numbers of those whose output is dropped."""
        self._dropped_at = 0.0
        self._nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def __contains__(self, end: int) -> bool:
        return end in self._numbers

    def begin(self, number: int) -> int:
        """A pipe for a process that will be forked; the end for `take`, to be closed here.

        OSError where this process may open no more files.
        """
        allow_open_files(len(self._outputs))
        end, theirs = os.pipe()
        os.set_blocking(end, False)
        self._outputs[number], self._numbers[end] = _Output(end), number
        self._poll.register(end, select.POLLIN)
        return theirs

    def take(self, theirs: int) -> None:
        """In the forked process: print into its own pipe, and hold no other open."""
        for descriptor in (1, _STDERR):
            os.dup2(theirs, descriptor)
        for descriptor in (theirs, self._nowhere, *self._numbers):
            os.close(descriptor)

    def pass_on(self, end: int) -> None:
        """Write a part of what has come, or drop it."""
        number = self._numbers[end]
        output = self._outputs[number]
        if not self._move(output):
            self._close(output)
        elif output.cut:
            # From now on it is looked at now and then, whether or not something has come.
            self._poll.unregister(end)
            self._cut[number] = None
            with suppress(OSError):
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def wait_ms(self) -> float | None:
        """After how long to call `drop`; None for no reason to."""
        return 1000 * _DROP_EVERY_S if self._cut else None

    def drop(self) -> None:
        """Empty the pipes of those whose output is dropped, if it is time for that."""
        now = time.monotonic()
        if not self._cut or now < self._dropped_at + _DROP_EVERY_S:
            return
        self._dropped_at = now
        for number in list(self._cut):
            output = self._outputs[number]
            if not self._move(output):
                del self._cut[number]
                self._close(output)

    def finish(self, number: int) -> None:
        """The process has ended: write the rest of what it printed."""
        output = self._outputs.pop(number)
        self._cut.pop(number, None)
        # What it started may go on printing, until it is killed.
        for _ in range(_LAST_READS):
            if output.end < 0 or not self._move(output):
                break
        self._close(output)

    def _move(self, output: _Output) -> bool:
        """Take a part of what has come; false at the end."""
        try:
            if output.cut:
                flags = os.SPLICE_F_NONBLOCK
                moved = os.splice(output.end, self._nowhere, _PIPE_BYTES, flags=flags)
                self._say(output)
                return moved > 0
            data = os.read(output.end, EACH_BYTES)
        except BlockingIOError:
            return True
        room = max(0, min(EACH_BYTES - output.written, ALL_BYTES - self._written))
        count = self._write(data[:room])
        output.written += count
        if count < len(data):
            output.cut = True
            self._say(output)
        return len(data) > 0

    def _say(self, output: _Output) -> None:
        if not output.said:
            # Above the limit of all together nothing more is said.
            output.said = self._written > ALL_BYTES or self._write(CUT.encode()) > 0

    def _write(self, data: bytes) -> int:
        """Write to standard error; how many bytes it took."""
        count = 0
        with suppress(OSError):  # it is closed, or a disk is full
            while count < len(data):
                wait_s = 0.0 if self._stuck else _STUCK_S
                _, ready, _ = select.select([], [_STDERR], [], wait_s)
                self._stuck = not ready
                if self._stuck:
                    break
                # More than a pipe surely takes could wait for its reader.
                count += os.write(_STDERR, data[count : count + select.PIPE_BUF])
        self._written += count
        return count

    def _close(self, output: _Output) -> None:
        if output.end >= 0:
            del self._numbers[output.end]
            with suppress(KeyError):  # it is looked at now and then
                self._poll.unregister(output.end)
            os.close(output.end)
            output.end = -1
