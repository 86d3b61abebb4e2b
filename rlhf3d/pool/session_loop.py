"""The thread of a SessionPool: sockets, calls and deadlines of all its sessions.

Invariant: it never waits for one session: it neither blocks in a write nor reads without end. A
call ends at its deadline, also where the process is not forked yet, does not read what it is sent,
or stops in the middle of its reply. If the zygote dies, its sessions end, and the next one gets
another zygote.
Runs in: the process that makes the pool, in a thread of its own, except `post` and `close`.
"""

from __future__ import annotations

import os
import resource
import selectors
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Lock

from rlhf3d.pool.deadlines import Deadlines
from rlhf3d.pool.process import CallResult, Ending, StartError, read_reply
from rlhf3d.pool.session_state import Call, SessionState, died, load_reply, take_message
from rlhf3d.pool.zygote import Report, Zygote
from rlhf3d.processes import allow_open_files

_READ_BYTES = 2**18
"""Read of one session before the others get their turn."""
_FORKS_AT_ONCE = 32
"""Requests to fork that the zygote has not answered: requests to kill wait behind them."""
_GRACE_S = 2.0
"""How long the process of a closed session may take to end by itself."""
_LOST_S = 1.0
"""How long a process may live on that has closed its end of the socket."""
_STALL_S = 60.0
"""A zygote that answers no request to fork for this long is treated as dead."""
_END_S = 5.0
"""How long a zygote may take to kill what it has started."""
CLOSE_S = _GRACE_S + _END_S + 5.0
"""What the thread may need to end."""
_MAX_DEATHS = 3
"""Zygotes that die, without a reply of any session in between, before the pool gives up."""
_TURN_S = 60.0
"""How long the loop waits at once when nothing is due."""


class SessionLoop:
    """What `run` does, until `close`."""

    def __init__(self, recipe: bytes, what: str, startup_timeout_s: float) -> None:
        self._recipe, self._what, self._startup_timeout_s = recipe, what, startup_timeout_s
        # What the lock guards: these five.
        self._lock = Lock()
        self._posted: deque[tuple[Callable[[], None], Call | None]] = deque()
        self._failure: Exception | None = None
        self._closed = self._over = False
        self._loading: Zygote | None = None

        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._deadlines: Deadlines[SessionState | Zygote] = Deadlines()
        self._zygote: Zygote | None = None
        self._deaths = 0
        self._sessions: set[SessionState] = set()
        """Those that have been called and have not ended."""
        self._to_fork: deque[SessionState] = deque()
        self._forking: set[int] = set()
        self._processes: dict[int, SessionState] = {}
        """By number, those whose process has not been reported to have ended."""

    def post(self, action: Callable[[], None], call: Call | None = None) -> None:
        """Have the loop's thread do something, from any thread, for `call` if there is one."""
        with self._lock:
            assert call is None or not self._closed, "the pool is closed"
            if not self._over:
                self._posted.append((action, call))
                os.eventfd_write(self._wake, 1)
                return
        if call is not None:
            assert self._failure is not None
            call.fail(self._failure)

    def close(self) -> None:
        """Have the loop end everything and itself, from any thread."""
        with self._lock:
            self._closed = True
            if self._loading is not None:
                self._loading.kill()  # its loading is waited for
            if not self._over:
                os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """The life of the thread."""
        failure = None
        try:
            self._start_zygote()
            while not self._closed:
                self._turn()
            self._close_sessions()
        except Exception as error:  # a StartError, or the machine starts no more processes
            if not self._closed:  # else it is a zygote that `close` has killed
                failure = error
        finally:
            self._end(failure)

    def _turn(self, at_most_s: float = _TURN_S) -> None:
        """Wait for something to happen, and see to it."""
        self._fork_some()
        wait_s = self._deadlines.wait_s()
        wait_s = at_most_s if wait_s is None else min(wait_s, at_most_s)
        for key, events in self._selector.select(wait_s):
            key.data(events)
        while (due := self._deadlines.take_due()) is not None:
            if isinstance(due, Zygote):
                self._zygote_died("it does not answer")
            else:
                self._at_deadline(due)

    def _woken(self, events: int) -> None:
        os.eventfd_read(self._wake)
        while True:
            with self._lock:
                if not self._posted:
                    return
                action, _ = self._posted.popleft()
            action()

    # Calls

    def add_call(self, session: SessionState, call: Call) -> None:
        """Make a call, after those of the session that came before."""
        if session.ended is not None:
            call.end(died(session.ended))
            return
        self._sessions.add(session)
        session.calls.append(call)
        if not session.forked and self._zygote is None:
            # No other session waits meanwhile: their processes have died with the former zygote.
            self._start_zygote()
        self._begin_next(session)

    def close_session(self, session: SessionState) -> None:
        """End a session and its process."""
        if session.ended is not None:
            return
        for call in session.calls:
            call.cancel()
        session.calls.clear()
        busy = session.running is not None
        self._end_session(session, Ending.DIED, "the session was closed")
        # A process that waits for its next call now finds that there is none.
        self._end_process(session, 0.0 if busy else _GRACE_S)

    def _begin_next(self, session: SessionState) -> None:
        while session.running is None and session.calls:
            call = session.calls.popleft()
            # False where it was cancelled while it waited.
            if call.future.set_running_or_notify_cancel():
                session.running = call
                session.unsent = memoryview(call.message)
                self._deadlines.set(session, call.begin())
        if session.running is None:
            return
        if not session.forked:
            session.forked = True
            self._to_fork.append(session)
        elif session.socket is not None:
            self._send(session)

    def _at_deadline(self, session: SessionState) -> None:
        if session.ended is None and session.socket is None and session.number in self._processes:
            self._end_session(session, Ending.DIED, "it closed its connection to the pool")
        elif session.ended is None:
            assert session.running is not None
            message = f"it took more than {session.running.timeout_s} s"
            self._end_session(session, Ending.TIMEOUT, message)
        self._end_process(session, 0.0)

    def _end_session(self, session: SessionState, ending: Ending, message: str) -> None:
        """End its calls, and take no more."""
        self._release(session)
        self._deadlines.clear(session)
        self._sessions.discard(session)
        session.ended = f"the process that kept its state has ended: {message}"
        if session.running is not None:
            session.running.finish(CallResult(ending, message=message))
            session.running = None
        for call in session.calls:
            call.end(died(session.ended))
        session.calls.clear()

    def _fail_session(self, session: SessionState, error: Exception) -> None:
        """Have its calls raise: it is not the session's code that failed."""
        calls = [session.running] if session.running is not None else []
        calls += session.calls
        session.running = None
        session.calls.clear()
        for call in calls:
            call.fail(error)
        self._end_session(session, Ending.DIED, str(error))

    # Sockets

    def _on_socket(self, session: SessionState, events: int) -> None:
        if events & selectors.EVENT_WRITE and session.socket is not None:
            self._send(session)
        if events & selectors.EVENT_READ:
            self._read(session)

    def _send(self, session: SessionState) -> None:
        """Send what the socket takes now."""
        assert session.socket is not None
        events = selectors.EVENT_READ
        try:
            sent = session.socket.send(session.unsent)
            session.unsent = session.unsent[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self._lose(session)
            return
        if session.unsent:
            events |= selectors.EVENT_WRITE
        if self._selector.get_key(session.socket).events != events:
            self._selector.modify(session.socket, events, partial(self._on_socket, session))

    def _read(self, session: SessionState) -> bool:
        """Read a part of what has come; whether there was something."""
        if session.socket is None:  # closed earlier in this turn
            return False
        try:
            data = session.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._lose(session)
            return False
        session.received += data
        self._take_reply(session)
        return True

    def _take_reply(self, session: SessionState) -> None:
        try:
            reply = take_message(session.received)
            if reply is None:
                return
            if session.running is None or session.unsent or session.received:
                raise ValueError("more than one reply to each call")
        except ValueError:
            self._end_session(session, Ending.DIED, "it wrote into its connection to the pool")
            self._end_process(session, 0.0)
            return
        self._deaths = 0
        self._deadlines.clear(session)
        call, session.running = session.running, None
        call.finish(read_reply(reply, load_reply))
        self._begin_next(session)

    def _lose(self, session: SessionState) -> None:
        """The other end is closed: wait for the report why, but not for long."""
        self._release(session)
        soon = time.monotonic() + _LOST_S
        self._deadlines.set(session, min(soon, self._deadlines.get(session) or soon))

    def _release(self, session: SessionState) -> None:
        if session.socket is not None:
            self._selector.unregister(session.socket)
            session.socket.close()
            session.socket = None
        session.unsent, session.received = memoryview(b""), bytearray()

    # The zygote and the processes

    def _start_zygote(self) -> None:
        zygote = Zygote(self._recipe)
        with self._lock:
            self._loading = self._zygote = zygote
            if self._closed:  # `close` has not seen this one
                zygote.kill()
        try:
            zygote.wait_until_ready(self._startup_timeout_s, self._what)
        finally:
            with self._lock:
                self._loading = None
        self._selector.register(zygote.ended, selectors.EVENT_READ, self._on_zygote_end)
        self._selector.register(zygote.control, selectors.EVENT_READ, self._on_zygote)

    def _on_zygote(self, events: int) -> None:
        # Null where it died earlier in this turn.
        while self._zygote is not None and (report := self._zygote.receive()) is not None:
            self._take_report(report)
        self._ask()

    def _take_report(self, report: Report) -> None:
        assert self._zygote is not None
        self._forking.discard(report.number)
        if self._forking:
            self._deadlines.set(self._zygote, time.monotonic() + _STALL_S)
        else:
            self._deadlines.clear(self._zygote)
        if report.how_it_ended is None and report.error is None:
            return
        session = self._processes.pop(report.number)
        if session.ended is not None:
            self._deadlines.clear(session)
        elif report.error is not None:
            self._fail_session(session, _too_many(report.error, len(self._processes)))
        else:
            # It may have replied before it ended.
            while self._read(session):
                pass
            if session.ended is None:
                self._end_session(session, Ending.DIED, report.how_it_ended or "")

    def _on_zygote_end(self, events: int) -> None:
        if self._zygote is not None:
            while (report := self._zygote.receive()) is not None:
                self._take_report(report)
            self._zygote_died("")

    def _zygote_died(self, why: str) -> None:
        """End all sessions that have a process; StartError where this happens again and again."""
        assert self._zygote is not None
        how = self._drop_zygote(0.0)
        message = f"the process that all sessions were forked from has ended: {why or how}"
        sessions = list(self._processes.values())
        self._processes.clear()
        self._forking.clear()
        for session in sessions:
            if session.ended is None:
                self._end_session(session, Ending.DIED, message)
            self._deadlines.clear(session)
        self._deaths += 1
        if self._deaths >= _MAX_DEATHS:
            raise StartError(f"{self._what}: {message} ({self._deaths} times in a row)")
        self._to_fork = deque(session for session in self._to_fork if session.ended is None)
        if self._to_fork:
            self._start_zygote()
            for session in self._to_fork:
                assert session.running is not None
                self._deadlines.set(session, session.running.begin())

    def _drop_zygote(self, grace_s: float) -> str:
        assert self._zygote is not None
        zygote, self._zygote = self._zygote, None
        self._deadlines.clear(zygote)
        for file in (zygote.control, zygote.ended):
            # It is not registered where it never became ready.
            if file in self._selector.get_map():
                self._selector.unregister(file)
        return zygote.end(grace_s)

    def _fork_some(self) -> None:
        """Ask for the processes of sessions that have none."""
        while self._to_fork and len(self._forking) < _FORKS_AT_ONCE:
            session = self._to_fork.popleft()
            if session.ended is not None:  # since then
                continue
            assert self._zygote is not None
            try:
                allow_open_files(len(self._processes))
                session.socket = self._zygote.fork(session.number)
            except OSError as error:
                self._fail_session(session, _too_many(error, len(self._processes)))
                continue
            self._processes[session.number] = session
            self._forking.add(session.number)
            self._deadlines.set(self._zygote, time.monotonic() + _STALL_S)
            handler = partial(self._on_socket, session)
            self._selector.register(session.socket, selectors.EVENT_READ, handler)
            self._send(session)
        self._ask()

    def _end_process(self, session: SessionState, grace_s: float) -> None:
        if session.number not in self._processes:
            return
        if grace_s:
            self._deadlines.set(session, time.monotonic() + grace_s)
            return
        assert self._zygote is not None
        self._zygote.stop(session.number)
        self._ask()

    def _ask(self) -> None:
        """Send the zygote what it takes now."""
        if self._zygote is None:
            return
        events = selectors.EVENT_READ
        if not self._zygote.send():
            events |= selectors.EVENT_WRITE
        if self._selector.get_key(self._zygote.control).events != events:
            self._selector.modify(self._zygote.control, events, self._on_zygote)

    # The end

    def _close_sessions(self) -> None:
        for session in list(self._sessions):
            self.close_session(session)
        give_up = time.monotonic() + _GRACE_S + _LOST_S
        while self._processes and (left_s := give_up - time.monotonic()) > 0:
            self._turn(left_s)

    def _end(self, failure: Exception | None) -> None:
        """End everything; all calls raise `failure`, or are cancelled."""
        with self._lock:
            self._failure, self._over = failure, True
            posted = list(self._posted)
            self._posted.clear()
            os.close(self._wake)
        for session in list(self._sessions):
            if failure is None:
                self.close_session(session)
            else:
                self._fail_session(session, failure)
        for _, call in posted:
            if call is None:
                continue
            if failure is None:
                call.cancel()
            else:
                call.fail(failure)
        if self._zygote is not None:
            self._drop_zygote(_END_S)
        self._selector.close()


def _too_many(error: OSError, sessions: int) -> OSError:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OSError(
        error.errno,
        f"{error.strerror}: there are {sessions} sessions already, and each needs a process and an "
        f"open file; have fewer at once, or raise the limits (`ulimit -Hn` is {hard}; `ulimit -u`)",
    )
