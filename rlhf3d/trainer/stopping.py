"""When a run stops before its last step: a signal, or a time limit that the next step would pass.

Invariant: the first SIGTERM or SIGUSR1 stops at the next step boundary, the second (and Ctrl-C) at once; before the
loop there is nothing to save and one is enough, after it none disturbs the closing.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

PREEMPTED = 75
"""Exit code: stopped after a checkpoint; the same command goes on (EX_TEMPFAIL)."""
CLOSING_S = 15.0
"""Left for ending all processes."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """A signal came before the loop."""


class Stopping:
    """Asked at each step boundary."""

    def __init__(self, limit_s: float | None, age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit_s`: trainer.max_wall_clock_s; `age_s`: seconds that the process has run."""
        self._limit_s, self._clock = limit_s, clock
        self._boundary = clock()
        self._began = self._boundary - age_s
        self._steps: deque[float] = deque(maxlen=3)
        self._signal: str | None = None
        self._phase: Literal["starting", "loop", "closing"] = "starting"

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Inside, signals come here (SIGTERM once more after Ray has taken it: see `ray_cluster`)."""
        previous = [signal.signal(number, self.handle) for number in SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(SIGNALS, previous, strict=True):
                signal.signal(number, handler)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler."""
        again, self._signal = self._signal is not None, signal.Signals(signum).name
        if self._phase == "starting":
            raise Preempted
        if self._phase == "loop" and again:
            raise KeyboardInterrupt
        if self._phase == "loop":
            # Not through the console, whose lines this may have come in the middle of.
            text = f"{self._signal}: after this step a checkpoint, then the end; the same signal again ends it now\n"
            os.write(sys.stderr.fileno(), text.encode())

    @contextmanager
    def loop(self) -> Iterator[None]:
        """The loop runs inside."""
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
        """Why to stop now, None to go on; `save_s` is what a save takes."""
        if self._signal is not None:
            return f"{self._signal} was received"
        if self._limit_s is None:
            return None
        now = self._clock()
        step_s = max([*self._steps, now - self._boundary])
        if now - self._began + step_s + save_s + CLOSING_S <= self._limit_s:
            return None
        return (
            f"{now - self._began:.0f} s have passed, and with one more step of {step_s:.0f} s and a save of "
            f"{save_s:.0f} s the run would pass trainer.max_wall_clock_s = {self._limit_s:g}"
        )
