"""The live view on a terminal: drawn by one thread, below everything else that is printed.

Invariant: while it is up, what anybody writes to this process's standard output and errors (the
processes that inherit them too) appears above the view in complete lines; afterwards both are what
they were. The terminal's cursor is never hidden: a process that is killed leaves it visible.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from rich.console import ConsoleDimensions, RenderableType
from rich.live import Live
from rich.text import Text

from rlhf3d.processes import stop_signals_blocked
from rlhf3d.terminal import Terminal

REFRESH_S = 0.5
"""Seconds between two drawings; figures change once a second."""
_READ_BYTES = 2**16
_END_S = 2.0
"""How long the end waits for the thread."""


class LiveTerminal(Terminal):
    """A terminal below whose text a view is drawn."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave it as it is."""
        return False


def fit(terminal: Terminal) -> None:
    """Take the size that the terminal has now; rich asks standard output, which may be a pipe."""
    with suppress(OSError, ValueError):  # no terminal at all
        columns, rows = os.get_terminal_size(terminal.file.fileno())
        # A pseudo-terminal that nobody gave a size says 0.
        terminal.size = ConsoleDimensions(columns or 80, rows or 25)


def _start(thread: threading.Thread) -> None:
    """Start it so that no signal that asks the run to stop is delivered to it.

    Where the run's own thread blocks them (it starts Ray, say), they wait for that thread.
    """
    with stop_signals_blocked():
        thread.start()


class _Drawn:
    """The view as it is when it is drawn, below a line of the run or by itself."""

    def __init__(self, picture: Callable[[], RenderableType]) -> None:
        self._picture = picture

    def __rich__(self) -> RenderableType:
        return self._picture()


class Screen:
    """The view below what `terminal` prints, between `start` and `stop`."""

    def __init__(self, terminal: Terminal, picture: Callable[[], RenderableType]) -> None:
        """`picture` is called for each drawing, by any thread."""
        self.terminal = terminal
        self._live = Live(
            _Drawn(picture),
            console=terminal,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="live view", daemon=True)

    def start(self) -> None:
        """Draw it from now on."""
        self._live.start(refresh=True)
        _start(self._thread)

    def refresh(self) -> None:
        """Draw it as it is now."""
        self._live.refresh()

    def stop(self) -> None:
        """Take it away."""
        self._ended.set()
        self._thread.join(_END_S)
        self._live.stop()

    def _keep_drawing(self) -> None:
        while not self._ended.wait(REFRESH_S):
            try:
                self._live.refresh()
            except OSError:
                self.terminal.quiet = True  # it has gone away: no reason to end a run
                return


class Captured:
    """Standard output and errors of this process, where they are the terminal, read by a thread.

    `print_line` gets each line of them.
    """

    def __init__(self, print_line: Callable[[Text], None]) -> None:
        self._print_line = print_line
        self._saved: dict[int, int] = {}
        """A copy of each descriptor that is captured."""
        self._read, self._write = os.pipe()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="captured output", daemon=True)

    def start(self) -> TextIO:
        """Begin; the terminal, as a file to print to."""
        sys.stdout.flush()
        sys.stderr.flush()
        terminal = os.dup(1)
        for descriptor in (1, 2):
            if os.isatty(descriptor):
                self._saved[descriptor] = os.dup(descriptor)
                os.dup2(self._write, descriptor)
        _start(self._thread)
        # As `write_what_can_be_encoded` does for the standard ones.
        return open(terminal, "w", encoding=sys.stdout.encoding, errors="backslashreplace")

    def stop(self) -> None:
        """Give both back; what was written to them until now is printed."""
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in self._saved.items():
            os.dup2(saved, descriptor)
            os.close(saved)
        self._ended.set()
        os.close(self._write)  # wakes the thread, where no other process has it open
        self._thread.join(_END_S)

    def _pass_on(self) -> None:
        rest, ended = b"", False
        while not ended:
            # Asked before the last look, so that nothing written before is missed.
            ended = self._ended.is_set()
            ready, _, _ = select.select([self._read], [], [], 0 if ended else REFRESH_S)
            # A line without an end is shown once nothing follows it.
            read = os.read(self._read, _READ_BYTES) if ready else b""
            *lines, rest = (rest + read).split(b"\n")
            self._print(lines if read or not rest else [*lines, rest])
            rest = rest if read else b""
            ended = ended and not read
        os.close(self._read)

    def _print(self, lines: list[bytes]) -> None:
        for line in lines:
            # What stands after the last return is what a terminal would show.
            shown = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            self._print_line(Text.from_ansi(shown))
