"""The processes that a run starts: which signals reach them, and how they are found again.

Invariant: what asks the run to stop (or Ctrl-C) is heard by the driver alone, also where a terminal, `timeout`, a
service manager or a scheduler sends it to every process: the others work until the driver ends them.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP})
_MARK = "RLHF3D_STARTED_BY"


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Processes started inside, and theirs, never get STOP_SIGNALS (a blocked signal stays so through fork and exec).

    This thread gets at the end what came meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def listen_again() -> None:
    """In a process started deaf that runs the user's code: ignore STOP_SIGNALS, but not in what that code starts."""
    for number in STOP_SIGNALS:
        signal.signal(
            number, lambda signum, frame: None
        )  # unlike SIG_IGN, not inherited through exec
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    os.register_at_fork(after_in_child=_as_by_default)


def _as_by_default() -> None:
    for number in STOP_SIGNALS:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )


@contextmanager
def marked() -> Iterator[str]:
    """Processes started inside, and theirs, are found by the mark that this gives, whoever their parent is then."""
    mark = secrets.token_hex(8)
    os.environ[_MARK] = mark
    try:
        yield mark
    finally:
        del os.environ[_MARK]


def find_marked(mark: str) -> list[psutil.Process]:
    """All processes with a mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found
