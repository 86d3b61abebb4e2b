"""Signals that ask a run to stop end none of its processes, and reach those of a user's code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil

from rlhf3d.pool.pool import CallPool
from rlhf3d.processes import STOP_SIGNALS, find_marked, marked, stop_signals_blocked

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
FORKED = """
import multiprocessing, time
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(10)
    print(child.exitcode)
"""


def test_what_is_started_deaf_stays_so_with_its_children_and_is_found() -> None:
    shell = f"{sys.executable} -c 'import time; time.sleep(60)' & wait"
    with marked() as mark, stop_signals_blocked():
        parent = subprocess.Popen(["bash", "-c", shell])
    while len(found := find_marked(mark)) < 2:
        time.sleep(0.01)
    for process in found:
        for number in STOP_SIGNALS:
            process.send_signal(number)
    parent.kill()
    parent.wait()
    (orphan,) = find_marked(mark)
    assert orphan.pid != parent.pid and orphan.status() != psutil.STATUS_ZOMBIE
    orphan.kill()
    psutil.wait_procs([orphan], timeout=10)
    assert find_marked(mark) == []


def test_a_signal_meanwhile_is_heard_afterwards() -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("USR1"))
    try:
        with stop_signals_blocked():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert heard == []
        assert heard == ["USR1"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def load_slow() -> Callable[[object], bool]:
    return slow


def slow(payload: object) -> bool:
    """Is sent every signal, then uses processes of its own as anybody would."""
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    ended = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=30
    )
    child = subprocess.Popen(SLEEP)
    child.terminate()
    return child.wait(10) == -signal.SIGTERM and ended.stdout.strip() == str(-signal.SIGTERM)


def test_calls_go_on_under_signals_and_end_their_own_processes() -> None:
    pool = CallPool(load_slow, 1, what="slow")
    result = pool.submit(None, 60.0).result(60.0)
    pool.close()
    assert result.value is True, result.message
