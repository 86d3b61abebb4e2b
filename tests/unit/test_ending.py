"""The end of a command: its exit code, and what must still happen in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, gc, sys, threading, time
from rlhf3d.ending import ending_at_once

class Left:
    def __del__(self):
        print("taken apart")

left = [Left()]
left.append(left)
with ending_at_once():
    atexit.register(print, "library", end="; ")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end="; "))).start()
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code", "printed", "error"),
    [
        ("pass", 0, "thread; library; ", ""),
        ("sys.exit(75)", 75, "thread; library; ", ""),
        ("sys.exit()", 0, "thread; library; ", ""),
        ("sys.exit('why')", 1, "thread; library; taken apart\n", "why"),
        ("1 / 0", 1, "thread; library; taken apart\n", "ZeroDivisionError"),
    ],
)
def test_threads_and_handlers_come_before_the_end_and_modules_stay(
    end: str, code: int, printed: str, error: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, printed)
    assert error in done.stderr and bool(error) == bool(done.stderr)
