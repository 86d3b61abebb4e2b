"""Every operation of torch in the first seconds of a phase, as a trace on the step's clock.

Invariant: only the thread that begins a trace is traced, for the time asked for, and it alone ends
the trace; files are written when the step is over, so that writing them costs no phase its time.
"""

from __future__ import annotations

import gzip
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE_S = 5.0
_UNSAFE = re.compile(r"[^A-Za-z0-9.]+")
_TIME = re.compile(r'"ts": (-?[0-9]+(?:\.[0-9]+)?)')
_BASE = re.compile(r'"baseTimeNanoseconds": ([0-9]+)')


@dataclass(frozen=True)
class OperationsSettings:
    """What is traced, and where that goes."""

    folder: str
    process: str
    """Begins the names of its files."""
    seconds: float
    """Of each phase."""


@dataclass
class Operations:
    """The traces of one process in a profiled step."""

    settings: OperationsSettings
    traced: dict[str, Any] = field(default_factory=dict)
    """torch's profiler by phase; each phase is traced once, where it is the first time."""
    _running: str | None = None
    _until: float = 0.0

    def begin(self, phase: str) -> None:
        """Trace from here on, unless that is done already."""
        if self._running is not None or phase in self.traced:
            return
        from torch.profiler import ProfilerActivity, profile, supported_activities

        wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
        profiler: Any = profile(activities=wanted & set(supported_activities()))
        profiler.start()
        self.traced[phase] = profiler
        self._running, self._until = phase, time.monotonic() + self.settings.seconds

    def look(self) -> None:
        """End a trace whose time is over; called between two pieces of work."""
        if self._running is not None and time.monotonic() > self._until:
            self.end()

    def end(self) -> None:
        """End the trace, where one is going on."""
        if self._running is not None:
            self.traced[self._running].stop()
            self._running = None

    def _ended(self) -> list[str]:
        """Phases whose traces are over; the thread of one that is not has GRACE_S to end it."""
        deadline = max(time.monotonic(), self._until) + GRACE_S
        while self._running is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        return [phase for phase in self.traced if phase != self._running]

    def write(self, began: int) -> None:
        """Write the files, with times since `began` on this machine's monotonic clock."""
        folder = Path(self.settings.folder)
        folder.mkdir(parents=True, exist_ok=True)
        # torch's times are of the wall clock, which may be set between steps, but hardly in one.
        wall = time.time_ns() - time.monotonic_ns()
        for phase in self._ended():
            profiler = self.traced[phase]
            name = _UNSAFE.sub("_", f"{self.settings.process}.{phase}")
            raw, path = folder / f"{name}.partial", folder / f"{name}.json.gz"
            profiler.export_chrome_trace(str(raw))
            with raw.open(encoding="utf-8") as lines, gzip.open(path, "wt", 3, "utf-8") as file:
                file.writelines(shifted(lines, began + wall))
            raw.unlink()


def shifted(lines: Iterable[str], began: int) -> Iterator[str]:
    """A trace of torch's, with times in µs since `began`, ns of the wall clock.

    Line by line: a trace may be larger than what should be read at once. The base of its times
    stands before all of them.
    """
    base = 0

    def at(found: re.Match[str]) -> str:
        # In whole ns first: a float of µs since the base has too few digits for a difference.
        whole, _, part = found[1].partition(".")
        ns = int(whole) * 1000 + int(part.ljust(3, "0")[:3] or 0)
        return f'"ts": {(ns + base - began) / 1000:.3f}'

    for line in lines:
        if found := _BASE.search(line):
            base = int(found[1])
            line = _BASE.sub('"baseTimeNanoseconds": 0', line)
        yield _TIME.sub(at, line)
