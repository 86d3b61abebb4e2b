"""The pool of killable calls: real processes throughout.

What it promises about hanging, crashing and greedy code is tested with reward functions, in
`tests/unit/rewards/test_scoring_pool.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any

import pytest

from rlhf3d.pool import process
from rlhf3d.pool.pool import CallPool
from rlhf3d.pool.process import CallResult, Ending, StartError


def load_counter() -> Callable[[Any], Any]:
    """A function with state: it counts its calls, sleeps for a float, and obeys words."""
    counted = 0

    def call(payload: Any) -> Any:
        nonlocal counted
        counted += 1
        if payload == "exit":
            os._exit(7)
        if payload == "raise":
            raise KeyError("the reason")
        if payload == "local":
            return lambda: 0
        time.sleep(payload)
        return os.getpid(), counted

    return call


def load_nothing(reason: str) -> Callable[[Any], Any]:
    raise RuntimeError(reason)


@pytest.fixture
def pool() -> Iterator[CallPool]:
    pool = CallPool(load_counter, 2, what="the counter")
    yield pool
    pool.close()


def values(*calls: Future[CallResult]) -> list[Any]:
    return [call.result(30.0).value for call in calls]


def test_each_call_ends_as_one_outcome(pool: CallPool) -> None:
    calls = {word: pool.submit(word, 20.0) for word in ("exit", "raise", "local")}
    late = pool.submit(1000, 0.3)
    assert values(pool.submit(0, 20.0))[0][1] >= 1
    results = {word: call.result(30.0) for word, call in calls.items()}
    assert results["exit"].ending is Ending.DIED and "exit code 7" in results["exit"].message
    assert results["raise"].ending is Ending.ERROR and "the reason" in results["raise"].message
    assert results["local"].ending is Ending.ERROR and "load_counter" in results["local"].message
    assert late.result(30.0).ending is Ending.TIMEOUT and "0.3 s" in late.result().message


def test_a_deadline_is_kept_while_nobody_waits(pool: CallPool) -> None:
    """The driver may be busy with something else: the next call still finds a free process."""
    hanging = [pool.submit(1000, 0.3) for _ in range(2)]
    following = pool.submit(0, 20.0)
    give_up = time.monotonic() + 30.0
    while not following.done() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert following.done() and all(call.done() for call in hanging)


def test_users_do_not_wait_for_each_other_and_results_come_as_they_finish(pool: CallPool) -> None:
    slow, quick = pool.submit(1000, 1000.0), [pool.submit(0.01, 20.0) for _ in range(20)]
    wait(quick, timeout=20.0)
    assert all(call.done() for call in quick) and not slow.done()
    waiting = [pool.submit(0, 20.0) for _ in range(3)]
    assert waiting[2].cancel() or waiting[2].done()


def test_a_function_that_does_not_load_ends_the_pool() -> None:
    pool = CallPool(partial(load_nothing, "no such thing"), 2, what="the judge")
    call = pool.submit(0, 1.0)
    with pytest.raises(StartError, match=r"could not load the judge:[\s\S]*no such thing"):
        call.result(30.0)
    with pytest.raises(StartError, match="no such thing"):
        pool.submit(0, 1.0).result(30.0)
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.submit(0, 1.0)


def test_a_machine_that_starts_no_process_fails_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    pool = CallPool(load_counter, 2, what="the counter")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            pool.submit(0, 1.0).result(30.0)
    pool.close()


def test_closing_ends_what_runs_and_cancels_what_waits() -> None:
    pool = CallPool(load_counter, 1, what="the counter")
    values(pool.submit(0, 20.0))
    running, waiting = pool.submit(1000, 1000.0), pool.submit(0, 20.0)
    while not running.running():
        time.sleep(0.01)
    pool.close()
    assert running.result(5.0).ending is Ending.DIED
    with pytest.raises(CancelledError):
        waiting.result(5.0)


def load_garbler() -> Callable[[Any], Any]:
    """A function that writes half of a message into the pool's own connection, and hangs."""

    def call(payload: Any) -> Any:
        os.write(int(sys.argv[1]), b"\0\0\x10\0half of it")
        time.sleep(1000)

    return call


def test_half_a_message_holds_up_its_own_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_STALL_S", 1)
    pool = CallPool(load_garbler, 1, what="the garbler")
    for _ in range(2):
        result = pool.submit(0, 0.5).result(30.0)
        assert result.ending is Ending.DIED and "exit code -9" in result.message
    pool.close()
