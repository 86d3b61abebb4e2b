"""Sessions in processes of their own: real processes throughout."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rlhf3d.pool import session_loop
from rlhf3d.pool.process import CallResult, Ending, StartError
from rlhf3d.pool.sessions import CallSession, SessionPool

SLEEPER = "import time; time.sleep(1000)"


def start(**options: Any) -> int:
    """A process that the session leaves behind; its number."""
    return subprocess.Popen([sys.executable, "-c", SLEEPER], **options).pid


def fork_and_return() -> str:
    """Both processes come back from it, the other one first."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return "forked" if pid else "the other"


def run_threads() -> int:
    threading.Thread(target=time.sleep, args=[1000]).start()
    return threading.active_count()


def send_garbage(message: bytes) -> None:
    """Write into the pool's own connection, and hang."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder that was listed is closed
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), message)
    time.sleep(1000)


class Handler:
    """Counts its calls, and does what a payload says: (function, arguments…)."""

    def __init__(self, closed: str = "") -> None:
        self.counted, self.load_pid, self.closed = 0, os.getpid(), closed
        np.random.rand()  # numpy's generator is in the zygote, and has a state

    def __call__(self, payload: Any) -> Any:
        self.counted += 1
        if payload is None:
            return os.getpid(), self.counted, self.load_pid
        function, *arguments = payload
        return function(*arguments)

    def close(self) -> None:
        if self.closed:
            time.sleep(0.3)  # longer than it takes to be killed
            Path(self.closed).write_text(f"{os.getpid()}")


def load_nothing(reason: str) -> Callable[[Any], Any]:
    raise RuntimeError(reason)


def load_slowly() -> Callable[[Any], Any]:
    time.sleep(1000)
    return Handler()


@pytest.fixture(scope="module")
def pool() -> Iterator[SessionPool]:
    pool = SessionPool(Handler, what="the handler")
    yield pool
    pool.close()


@pytest.fixture
def session(pool: SessionPool) -> Iterator[CallSession]:
    session = pool.session()
    yield session
    session.close()


def values(*calls: Future[CallResult]) -> list[Any]:
    results = [call.result(30.0) for call in calls]
    assert all(result.ending is Ending.VALUE for result in results), results
    return [result.value for result in results]


def gone(*pids: int, within_s: float = 30.0) -> bool:
    """Whether the processes end in time."""
    deadline = time.monotonic() + within_s
    while any(map(psutil.pid_exists, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_session_is_one_process_and_a_copy_of_what_was_loaded_once(pool: SessionPool) -> None:
    sessions = [pool.session() for _ in range(3)]
    calls = [session.call(None, 20.0) for session in sessions for _ in range(4)]
    seen = values(*calls)
    assert [count for _, count, _ in seen] == [1, 2, 3, 4] * 3
    assert len({pid for pid, _, _ in seen}) == 3
    (loader,) = {load_pid for _, _, load_pid in seen}
    assert loader not in {os.getpid(), *(pid for pid, _, _ in seen)}
    sessions[0].close()
    assert gone(seen[0][0]) and psutil.pid_exists(seen[-1][0])
    assert values(sessions[1].call(None, 20.0))[0][1] == 5
    for session in sessions:
        session.close()


ERRORS = {
    "raises": ((int, "x"), "ValueError"),
    "exits": ((sys.exit, 3), "SystemExit"),
    "is interrupted": ((eval, "(_ for _ in ()).throw(KeyboardInterrupt)"), "KeyboardInterrupt"),
    "does not pickle": ((threading.Lock,), "pickle"),
    "is too large": ((bytes, 2**28 + 1), "bytes, more than"),
    # One that no library imports: this process must not have it.
    "is of its own module": ((eval, "__import__('tabnanny').check"), "tabnanny"),
}
DEATHS = {
    "exits": ((os._exit, 7), "exit code 7"),
    "crashes": ((eval, "__import__('ctypes').string_at(0)"), "SIGSEGV"),
    "kills itself": ((eval, "__import__('os').kill(__import__('os').getpid(), 9)"), "SIGKILL"),
    "closes files": ((os.closerange, 3, 256), "exit code 0"),
    "closes files and hangs": (
        (eval, "[__import__('os').closerange(3, 256), __import__('time').sleep(1000)]"),
        "closed its connection",
    ),
    "sends garbage": ((send_garbage, b"\xff" * 9), "wrote into its connection"),
    "replies twice": ((send_garbage, b"\0\0\0\1." * 2), "wrote into its connection"),
}
HARMLESS = {
    "stdin": ((eval, "__import__('sys').stdin.read()"), ""),
    "prints": ((print, "said by a session"), None),
    "signals": ((eval, "__import__('signal').raise_signal(15)"), None),
    "forks": ((fork_and_return,), "forked"),
    "threads": ((run_threads,), 2),
    "large": ((bytes, 2**24), bytes(2**24)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_ends_its_call_only(session: CallSession, case: str) -> None:
    payload, expected = ERRORS[case]
    result = session.call(payload, 20.0).result(30.0)
    assert result.ending is Ending.ERROR and expected in result.message
    assert values(session.call(None, 20.0))[0][1] == 2


@pytest.mark.parametrize("case", DEATHS)
def test_a_death_ends_its_session_only(pool: SessionPool, session: CallSession, case: str) -> None:
    payload, expected = DEATHS[case]
    other = pool.session()
    pid, _, loader = values(other.call(None, 20.0))[0]
    (own_pid, _, _), call = values(session.call(None, 20.0))[0], session.call(payload, 20.0)
    queued = session.call(None, 20.0)
    result = call.result(30.0)
    assert result.ending is Ending.DIED and expected in result.message
    for later in (queued, session.call(None, 20.0)):
        assert later.result(30.0).ending is Ending.DIED and expected in later.result().message
    assert gone(own_pid)
    assert values(other.call(None, 20.0))[0] == (pid, 2, loader)
    other.close()


@pytest.mark.parametrize("case", HARMLESS)
def test_a_session_may(session: CallSession, case: str) -> None:
    payload, expected = HARMLESS[case]
    assert values(session.call(payload, 20.0)) == [expected]
    assert values(session.call(None, 20.0))[0][1] == 2


def test_a_session_that_dies_between_calls(session: CallSession) -> None:
    (pid, _, _) = values(session.call(None, 20.0))[0]
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    result = session.call(None, 20.0).result(30.0)
    assert result.ending is Ending.DIED and "SIGKILL" in result.message


def test_what_a_session_started_ends_with_it(pool: SessionPool, tmp_path: Path) -> None:
    """At a deadline, at a death and at the end; also what has left its process group."""
    for how in ("timeout", "death", "close"):
        session = pool.session()
        started = values(
            session.call((start,), 20.0),
            session.call((partial(start, start_new_session=True),), 20.0),
        )
        # A daemon: its parent has ended.
        file = tmp_path / how
        code = f"(setsid {sys.executable} -c '{SLEEPER}' & echo $! > {file})"
        values(session.call((subprocess.call, ["sh", "-c", code]), 20.0))
        started += [int(file.read_text()), values(session.call(None, 20.0))[0][0]]
        assert all(map(psutil.pid_exists, started))
        if how == "timeout":
            assert session.call((time.sleep, 1000), 0.2).result(30.0).ending is Ending.TIMEOUT
        elif how == "death":
            assert session.call((os._exit, 1), 20.0).result(30.0).ending is Ending.DIED
        session.close()
        assert gone(*started), how


def test_a_deadline_is_kept_whatever_the_others_do(pool: SessionPool) -> None:
    hanging = [pool.session() for _ in range(4)]
    begin = time.monotonic()
    late = [
        hanging[0].call((time.sleep, 1000), 0.5),
        # Never returns to the interpreter.
        hanging[1].call((eval, "__import__('re').match('(a+)+$', 'a' * 60 + 'b')"), 0.5),
        # Half of a message.
        hanging[2].call((send_garbage, b"\0\0\x10\0half of it"), 0.5),
    ]
    values(hanging[3].call(None, 20.0))
    stuck = hanging[3].call((time.sleep, 1000), 0.5)
    # Does not fit into the socket, and nobody reads it.
    queued = hanging[3].call((len, bytes(2**26)), 0.5)
    session = pool.session()
    for turn in range(20):
        assert values(session.call(None, 20.0))[0][1] == turn + 1
    results = [call.result(30.0) for call in (*late, stuck)]
    assert time.monotonic() - begin < 25.0
    assert [result.ending for result in results] == [Ending.TIMEOUT] * 4
    assert all("0.5 s" in result.message for result in results)
    assert queued.result(30.0).ending is Ending.DIED


def test_a_payload_that_nobody_reads_holds_up_its_own_session_only(pool: SessionPool) -> None:
    stopped, session = pool.session(), pool.session()
    pid, _, _ = values(stopped.call(None, 20.0))[0]
    os.kill(pid, signal.SIGSTOP)
    call = stopped.call((len, bytes(2**23)), 10.0)
    assert values(session.call((len, bytes(2**23)), 20.0)) == [2**23]
    assert not call.done()
    assert call.result(30.0).ending is Ending.TIMEOUT and gone(pid)
    session.close()


async def run_command() -> int | None:
    return await (await asyncio.create_subprocess_exec("sleep", "0.01")).wait()


async def nap(duration_s: float) -> tuple[int, bool]:
    await asyncio.sleep(duration_s)
    return id(asyncio.get_running_loop()), isinstance(asyncio.current_task(), asyncio.Task)


def test_async_functions_share_the_session_s_loop(session: CallSession) -> None:
    first, second = values(session.call((nap, 0.01), 20.0), session.call((nap, 0.01), 20.0))
    assert first == second
    assert values(session.call((run_command,), 20.0)) == [0]
    assert session.call((nap, 1000), 0.2).result(30.0).ending is Ending.TIMEOUT


def draw() -> tuple[float, float]:
    return random.random(), float(np.random.rand())


def test_sessions_draw_different_numbers(pool: SessionPool) -> None:
    sessions = [pool.session() for _ in range(3)]
    drawn = values(*[session.call((draw,), 20.0) for session in sessions])
    assert len({first for first, _ in drawn}) == len({second for _, second in drawn}) == 3
    for session in sessions:
        session.close()


def test_memory_is_limited_by_session() -> None:
    pool = SessionPool(Handler, what="the handler", memory_gib=0.5)
    greedy, session = pool.session(), pool.session()
    result = greedy.call((bytes, 2**30), 20.0).result(30.0)
    assert result.ending is Ending.DIED and "(out of memory)" in result.message
    assert values(session.call((len, bytes(2**24)), 20.0)) == [2**24]
    pool.close()


def test_a_zygote_that_dies_is_replaced() -> None:
    pool = SessionPool(Handler, what="the handler")
    sessions = [pool.session() for _ in range(3)]
    seen = values(*[session.call(None, 20.0) for session in sessions])
    zygote = seen[0][2]
    child = values(sessions[0].call((start,), 20.0))[0]
    running = sessions[1].call((time.sleep, 1000), 1000.0)
    assert sessions[2].call((os.kill, zygote, signal.SIGKILL), 20.0).result(30.0).ending in (
        Ending.DIED,
        Ending.VALUE,  # it was quicker
    )
    result = running.result(30.0)
    assert result.ending is Ending.DIED and "SIGKILL" in result.message
    assert sessions[0].call(None, 20.0).result(30.0).ending is Ending.DIED
    assert gone(zygote, child, *(pid for pid, _, _ in seen))
    assert values(pool.session().call(None, 20.0))[0][2] != zygote
    pool.close()


def kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


def test_a_zygote_that_dies_again_and_again_ends_the_pool() -> None:
    pool = SessionPool(Handler, what="the handler")
    for _ in range(session_loop._MAX_DEATHS):
        pool.session().call((kill_parent,), 20.0).result(30.0)
    for _ in range(2):
        with pytest.raises(StartError, match=r"the handler.*SIGKILL"):
            pool.session().call(None, 20.0).result(30.0)
    pool.close()


def test_a_zygote_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SessionPool(Handler, what="the handler")
    zygote = values(pool.session().call(None, 20.0))[0][2]
    os.kill(zygote, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(session_loop, "_STALL_S", 2.0)
        result = pool.session().call(None, 20.0).result(30.0)
    assert result.ending is Ending.DIED and "does not answer" in result.message
    assert values(pool.session().call(None, 20.0))[0][2] != zygote and gone(zygote)
    pool.close()


@pytest.mark.parametrize(
    ("load", "timeout_s", "reason"),
    [
        (partial(load_nothing, "no such thing"), 30.0, "no such thing"),
        (load_slowly, 1.0, "within 1.0 s"),
    ],
)
def test_a_function_that_does_not_load_ends_the_pool(
    load: Any, timeout_s: float, reason: str
) -> None:
    pool = SessionPool(load, what="the judge", startup_timeout_s=timeout_s)
    for _ in range(2):
        with pytest.raises(StartError, match=rf"the judge[\s\S]*{reason}"):
            pool.session().call(0, 1.0).result(30.0)
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.session().call(0, 1.0)


def load_in_a_second() -> Callable[[Any], Any]:
    time.sleep(1.0)
    return Handler()


def test_loading_is_no_part_of_a_call() -> None:
    pool = SessionPool(load_in_a_second, what="the handler")
    began = time.monotonic()
    result = pool.session().call((time.sleep, 0.1), 20.0).result(30.0)
    took = time.monotonic() - began
    pool.close()
    assert result.seconds is not None and 0.1 <= result.seconds < took - 0.5


def test_a_pool_that_is_loading_can_be_closed() -> None:
    begin = time.monotonic()
    pool = SessionPool(load_slowly, what="the judge")
    call = pool.session().call(0, 1.0)
    pool.close()
    assert time.monotonic() - begin < 5.0
    with pytest.raises(CancelledError):
        call.result(5.0)


def test_closing_ends_what_runs_and_cancels_what_waits(tmp_path: Path) -> None:
    files, children = len(os.listdir("/proc/self/fd")), psutil.Process().children(recursive=True)
    pool = SessionPool(partial(Handler, str(tmp_path / "closed")), what="the handler")
    busy, idle, hanging = pool.session(), pool.session(), pool.session()
    pids = [values(each.call(None, 20.0))[0][0] for each in (busy, idle, hanging)]
    running, waiting = busy.call((time.sleep, 1000), 1000.0), busy.call(None, 20.0)
    closed, behind = hanging.call((time.sleep, 1000), 1000.0), hanging.call(None, 20.0)
    hanging.close()
    result = closed.result(5.0)
    assert result.ending is Ending.DIED and "session was closed" in result.message
    assert behind.cancelled() and hanging.call(None, 20.0).result(5.0).ending is Ending.DIED
    pool.close()
    assert running.result(0.0).ending is Ending.DIED and waiting.cancelled()
    # The idle one had the time to close what it has.
    assert (tmp_path / "closed").read_text() == str(pids[1])
    assert not any(map(psutil.pid_exists, pids))
    assert psutil.Process().children(recursive=True) == children
    assert len(os.listdir("/proc/self/fd")) == files
    busy.close()
    pool.close()


def test_hundreds_of_sessions_take_the_time_of_one() -> None:
    pool = SessionPool(Handler, what="the handler")
    sessions = [pool.session() for _ in range(300)]
    pids = [pid for pid, _, _ in values(*[each.call(None, 60.0) for each in sessions])]
    assert len(set(pids)) == 300
    begin = time.monotonic()
    values(*[each.call((time.sleep, 3.0), 60.0) for each in sessions])
    # In waves of 64 they would need 15 s.
    assert 3.0 <= time.monotonic() - begin < 10.0
    pool.close()
    assert not any(map(psutil.pid_exists, pids))


DRIVER = """
import sys, time
from tests.unit.pool.test_sessions import Handler, start
from rlhf3d.pool.sessions import SessionPool
pool = SessionPool(Handler, what="the handler")
one, two = pool.session(), pool.session()
pids = [*one.call(None, 20.0).result(30.0).value[::2], one.call((start,), 20.0).result(30.0).value]
pids.append(two.call(None, 20.0).result(30.0).value[0])
two.call((time.sleep, 1000), 1000.0)
print(*pids, flush=True)
time.sleep(1000)
"""


def driver(code: str) -> subprocess.Popen[str]:
    """A process that has a pool."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_nothing_survives_a_driver_that_is_killed() -> None:
    process = driver(DRIVER)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 4 and all(map(psutil.pid_exists, pids))
    process.kill()
    process.wait()
    assert gone(*pids)


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from tests.unit.pool.test_sessions import Handler
from rlhf3d.pool.sessions import SessionPool
pool = SessionPool(Handler, what="the handler")
sessions = [pool.session() for _ in range(80)]
for call in [session.call(None, 30.0) for session in sessions]:
    try:
        print(call.result(40.0).ending)
    except OSError as error:
        print(error)
pool.close()
"""


def test_the_limit_of_files_is_raised_or_named() -> None:
    enough, _ = driver(FEW_FILES.format(soft=64, hard=1024)).communicate(timeout=60.0)
    assert enough.split() == ["value"] * 80
    few, _ = driver(FEW_FILES.format(soft=64, hard=64)).communicate(timeout=60.0)
    lines = few.splitlines()
    assert len(lines) == 80 and lines.count("value") > 20
    assert all(line == "value" or "ulimit" in line for line in lines)
    assert "sessions already" in lines[-1]
