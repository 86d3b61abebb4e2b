"""Waits that no exception gets out of."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from rlhf3d.placement import waiting
from rlhf3d.placement.waiting import exit_on_timeout

HANGS = """
import ctypes
from rlhf3d.placement.waiting import exit_on_timeout
with exit_on_timeout("connect to nobody", 0.2):
    ctypes.CDLL(None).sleep(60)  # lets other threads run, as Ray does while it waits
"""


def test_a_wait_within_its_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(waiting.os, "_exit", exits.append)
    with exit_on_timeout("a moment", 2.0):
        pass
    time.sleep(2.5)
    assert exits == []


def test_a_library_that_waits_for_ever_ends_the_process_with_what_it_waited_for() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "connect to nobody: no answer within 0.2 s (cluster.startup_timeout_s); raise it, or "
    )
