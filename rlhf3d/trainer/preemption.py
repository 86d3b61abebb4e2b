"""When a run stops before its last step: a signal, or a time limit that the next step would pass.

Invariant: the first SIGTERM, SIGUSR1 or SIGHUP stops at the next step boundary, the second (and
Ctrl-C) at once; before the loop there is nothing to save and one is enough, after it none disturbs
the closing. One that arrives in several ways (`timeout` sends it to its child and to the group,
Slurm to the script and to the step) is one.
Runs in: driver, its main thread: Python runs signal handlers there.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

import psutil

PREEMPTED = 75
"""Exit code: stopped after a checkpoint; the same command continues (EX_TEMPFAIL)."""
CLOSING_S = 15.0
"""Kept free for ending all processes."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL_S = 0.5
"""A signal within this time of the first one is the same one."""


class Preempted(BaseException):
    """A signal came before the loop."""


class PreemptionHandler:
    """Says at each step boundary whether to stop there."""

    def __init__(
        self, limit_s: float | None, age_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`limit_s`: trainer.max_wall_clock_s; `age_s`: seconds that the process has run."""
        self.limit_s, self._clock = limit_s, clock
        self._boundary = clock()
        # A time limit counts from the start of the process, imports included.
        self._began = self._boundary - age_s
        # Seconds of the last steps, the slowest of which stands for the next one.
        self._steps: deque[float] = deque(maxlen=3)
        self.signal: str | None = None
        """The first that came."""
        self._signaled = 0.0
        self._phase: Literal["starting", "loop", "closing"] = "starting"

    @classmethod
    def of_this_process(cls) -> PreemptionHandler:
        """Without a limit, and as old as the process."""
        return cls(None, time.time() - psutil.Process().create_time())

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Inside, signals come here (SIGTERM again after Ray has taken it: see `ray_cluster`)."""
        # A run under nohup is to survive the end of its terminal: nohup has SIGHUP ignored.
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = [signal.signal(number, self.handle) for number in handled]
        try:
            yield
        finally:
            for number, handler in zip(handled, previous, strict=True):
                signal.signal(number, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal: stop at the next step boundary, or at once."""
        again = self.signal is not None
        if again and self._clock() - self._signaled < SAME_SIGNAL_S:
            return
        self.signal = signal.Signals(signum).name
        if not again:
            self._signaled = self._clock()
        if self._phase == "starting" and not again:  # a second one would disturb the ending
            raise Preempted
        if self._phase == "loop" and again:
            raise KeyboardInterrupt
        if self._phase == "loop":
            # Not through the console, whose lines this may have come in the middle of.
            text = (
                f"{self.signal}: after this step a checkpoint, then the end; the same signal again "
                "ends it now\n"
            )
            with suppress(OSError):  # the terminal may be what went away
                os.write(2, text.encode())

    @contextmanager
    def loop(self) -> Iterator[None]:
        """The loop runs inside."""
        if self.signal is not None:  # a library's code swallowed what `handle` raised
            raise Preempted
        self._phase, self._boundary = "loop", self._clock()
        try:
            yield
        finally:
            self._phase = "closing"

    def step_ended(self) -> None:
        """A step with its validation and save is over."""
        now = self._clock()
        self._steps.append(now - self._boundary)
        self._boundary = now

    def reason(self, save_s: float) -> str | None:
        """Why to stop now, None to continue; `save_s` is what a save takes."""
        if self.signal is not None:
            return f"{self.signal} was received"
        if self.limit_s is None:
            return None
        now = self._clock()
        # With the step that is about to end, which `step_ended` has not counted yet.
        step_s = max([*self._steps, now - self._boundary])
        if now - self._began + step_s + save_s + CLOSING_S <= self.limit_s:
            return None
        return (
            f"{now - self._began:.0f} s have passed, and with one more step of {step_s:.0f} s and "
            f"a save of {save_s:.0f} s the run would pass trainer.max_wall_clock_s = "
            f"{self.limit_s:g}"
        )
