"""Sessions of users' code, each in a process of its own, with a deadline a call.

Invariant: every call ends exactly once, and whatever a session's code does costs that session only.
Runs in: the process that makes the pool; sessions may be made, called and closed by any thread.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any

from rlhf3d.pool.process import CallResult
from rlhf3d.pool.session_loop import CLOSE_S, SessionLoop
from rlhf3d.pool.session_state import Call, SessionState, frame

STARTUP_S = 120.0
"""Seconds in which the zygote has to be loaded."""


class SessionPool:
    """Processes forked from one, the zygote, that has run `load` once; one for each session.

    `load` returns the function that sessions call: what it has made by then is there in each
    session, as its own copy. Where the function is async, or returns an awaitable, the session
    waits for it, always in the same event loop; where it has a method `close`, that is called when
    the session is closed. `what` names it in messages. `load` must pickle, or pickle's own errors
    are raised. `memory_gib` is what one session may allocate, including what the zygote has.

    A reply holds plain data or objects of modules that this process has imported, in at most
    `zygote.MAX_REPLY_BYTES`; else the call ends as an error. The generators of `random`, numpy and
    torch are in another state in each session; code that is to be repeatable must take a seed.

        pool = SessionPool(Environments, what="environment.path")
        session = pool.session()
        session.call(payload, timeout_s).add_done_callback(finished.put)
        session.close()
    """

    def __init__(
        self,
        load: Callable[[], Callable[[Any], Any]],
        *,
        what: str,
        memory_gib: float | None = None,
        startup_timeout_s: float = STARTUP_S,
    ) -> None:
        # Pickled here: what does not pickle is raised to the caller.
        self._loop = SessionLoop(pickle.dumps((load, memory_gib)), what, startup_timeout_s)
        # The zygote ends with the thread that started it, so the pool has one for its whole life. A
        # daemon: a program can end without `close`.
        self._thread = Thread(target=self._loop.run, daemon=True)
        self._thread.start()

    def session(self) -> CallSession:
        """A session, whose first call starts its process; that lives until `close`."""
        return CallSession(self._loop)

    def close(self) -> None:
        """End all processes; calls that are being made end as `died`, others are cancelled."""
        self._loop.close()
        self._thread.join(CLOSE_S)


class CallSession:
    """Calls that are made one after the other in a process of their own.

    Once that process has ended, however it did, each further call ends as `died`.
    """

    def __init__(self, loop: SessionLoop) -> None:
        self._loop = loop
        self._state = SessionState()

    def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
        """Call the function with `payload`.

        Its time runs from when the call before it has ended and the zygote is loaded; forking the
        process and sending the payload count. Until then the future can be cancelled. It raises
        StartError where the function could not be loaded, as do all later calls of the pool, or
        OSError where the machine gives no more processes or open files. Callbacks of the future run
        in the pool's thread: they must not wait for anything.
        """
        # In the caller's thread: a large payload must not hold up other sessions.
        call = Call(frame(pickle.dumps(payload)), timeout_s)
        self._loop.post(partial(self._loop.add_call, self._state, call), call)
        return call.future

    def close(self) -> None:
        """End its process; a call that is being made ends as `died`, others are cancelled."""
        self._loop.post(partial(self._loop.close_session, self._state))
