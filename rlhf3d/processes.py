"""The processes that a run starts: which signals reach them, and how they are found again.

Invariant: a request to stop (or Ctrl-C) reaches the driver alone, also where a terminal, `timeout`,
a service manager or a scheduler sends it to every process: the others work until the driver ends
them.
Runs in: every process.
"""

from __future__ import annotations

import os
import resource
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP})
_MARK = "RLHF3D_STARTED_BY"
_OTHER_FILES = 512
"""Open files kept for what else a process does."""


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Keep STOP_SIGNALS from processes started inside, and from theirs.

    A blocked signal stays so through fork and exec. At the end, this thread gets what came.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def ignore_stop_signals() -> None:
    """Ignore STOP_SIGNALS in this process, but not in what a user's code starts from here."""
    for number in STOP_SIGNALS:
        # A handler before the unblock below: what came while it was blocked is delivered there.
        signal.signal(number, _ignore)  # unlike SIG_IGN, not inherited through exec
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # exec drops handlers by itself; a fork without exec keeps them.
    os.register_at_fork(after_in_child=_set_defaults)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _set_defaults() -> None:
    for number in STOP_SIGNALS - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    # Python's own default, which raises KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def marked() -> Iterator[str]:
    """Mark processes started inside, and theirs, so that they are found whoever their parent is."""
    mark = secrets.token_hex(8)
    # Environments are inherited, also by processes whose parent has ended.
    os.environ[_MARK] = mark
    try:
        yield mark
    finally:
        del os.environ[_MARK]


def find_marked(mark: str, variable: str = _MARK) -> list[psutil.Process]:
    """All processes with a mark, in their environment when they started."""
    marked_processes = []
    for process in psutil.process_iter():
        # Other users' processes may not be read, and some end meanwhile.
        with suppress(psutil.Error):
            if process.environ().get(variable) == mark:
                marked_processes.append(process)
    return marked_processes


def has_open(path: Path) -> bool:
    """Whether a process of this machine, of those that may be looked into, has a file open."""
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == wanted for file in process.open_files()):
                return True
    return False


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files where `count` of them come near it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + _OTHER_FILES >= soft and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
