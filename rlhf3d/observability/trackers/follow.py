"""All trackers of a run, each on a thread of its own.

Invariant: no tracker stops a run or delays a step, whatever it raises and however long it takes.
What it did not take is counted, and reported by its name: at the first failure, and as a sum at the
end.
Runs in: driver.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.trackers.protocol import Tracker

WAITING_CALLS = 1000
"""Of one tracker; what comes while so many wait is lost to it."""
OPEN_S = 30.0
"""Deadline of all trackers together to open."""
CLOSE_S = 60.0
"""Deadline of all trackers together to take what is waiting, and to finish."""
FAILURE_LETTERS = 300
"""Of a failure that is shown, in one line."""

Call = Callable[[Tracker], None]


class _Follower:
    """One tracker and its thread."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self.name = name
        self._make, self._warn = make, warn
        self._calls: queue.Queue[Call | None] = queue.Queue(WAITING_CALLS)
        self._given = 0
        self._taken = 0
        self._failure: str | None = None
        self._closed = False
        self._opened = threading.Event()
        # A daemon: a process does not wait at its end for a tracker that hangs.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def wait_open(self, until: float) -> None:
        """Wait until it is open or has failed to."""
        if not self._opened.wait(max(0.0, until - time.monotonic())):
            self._warn(f"{self.name} is not open after {OPEN_S:g} s; the run goes on meanwhile")

    def give(self, call: Call) -> None:
        """Leave a call to the thread."""
        self._given += 1
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failed(f"{WAITING_CALLS} calls are waiting")

    def finish(self) -> None:
        """Ask for the end; `wait` waits for it."""
        try:
            self._calls.put_nowait(None)
        except queue.Full:
            self._failed(f"{WAITING_CALLS} calls are waiting")

    def wait(self, until: float) -> None:
        """Wait for the end, and report what was lost."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if not self._closed:
            self._failed(f"it did not finish within {CLOSE_S:g} s")
        if lost := self._given - self._taken:
            self._warn(
                f"{self.name} did not take {lost} of {self._given} records ({self._failure}); "
                "metrics.jsonl and samples/ have all of them"
            )

    def _work(self) -> None:
        tracker = self._made()
        self._opened.set()
        while (call := self._calls.get()) is not None:
            if tracker is None:
                continue
            try:
                call(tracker)
                self._taken += 1
            except Exception as error:
                self._failed(f"{type(error).__name__}: {error}")
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                self._failed(f"{type(error).__name__}: {error}")
        self._closed = True

    def _made(self) -> Tracker | None:
        try:
            return self._make()
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")
            return None

    def _failed(self, why: str) -> None:
        """Every failure is in the log, the first one is shown."""
        logging.getLogger(__name__).warning("%s: %s", self.name, why)
        if self._failure is None:
            # Libraries raise pages; the log has all of it.
            self._failure = shorten(why, FAILURE_LETTERS, placeholder=" …")
            self._warn(f"{self.name} failed ({self._failure}); the run goes on without its record")


class Trackers:
    """All trackers of a run, as one."""

    def __init__(
        self, makers: Mapping[str, Callable[[], Tracker]], rows: int, warn: Callable[[str], None]
    ) -> None:
        """`makers`, by name, are called in the thread of their tracker."""
        self._followers = [_Follower(name, make, warn) for name, make in makers.items()]
        self._rows = rows
        # What a tracker starts must not be counted among the processes of a run, which start next
        # and are ended first.
        until = time.monotonic() + OPEN_S
        for follower in self._followers:
            follower.wait_open(until)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._give(lambda tracker: tracker.log(step, metrics))

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        if first := rows[: self._rows]:
            self._give(lambda tracker: tracker.samples(step, first, kind))

    def close(self) -> None:
        """Wait until they have taken everything, or their deadline is over."""
        until = time.monotonic() + CLOSE_S
        for follower in self._followers:
            follower.finish()
        for follower in self._followers:
            follower.wait(until)
        self._followers = []

    def _give(self, call: Call) -> None:
        for follower in self._followers:
            follower.give(call)
