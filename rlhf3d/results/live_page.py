"""The page of runs that are going on, made again when they have written more.

Invariant: files are looked at, and the page is made, at most once in `EVERY_S` and in at most a
fifth of the time, however many ask; only reads. There is always something to show: what is wrong
with a run's files is said above the last page that could be made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from rlhf3d.checkpoints.store import CONFIG_FILE
from rlhf3d.observability.metrics import METRICS_FILE, STEP_TIME, read_metrics
from rlhf3d.observability.outcome import RECORD_FILE, RunRecord, read_record
from rlhf3d.observability.page.collect import RunView
from rlhf3d.observability.page.render import render, render_waiting, watched_policy
from rlhf3d.observability.page.serve import Served
from rlhf3d.observability.page.trends import values
from rlhf3d.processes import has_open
from rlhf3d.results.run_page import Rows, view_all

EVERY_S = 3.0
LATE_S, LATE_STEPS = 60.0, 3.0
"""A run is asked after when it is so long, and so many of its longest last steps, without a row."""
Stamp = tuple[int, int] | None
"""Of a file: when it was written, ns, and its bytes."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    name: str
    step: int
    step_s: float
    """The longest of the last steps."""

    def line(self, record: RunRecord | None, age_s: float, is_written: Callable[[], bool]) -> str:
        """In words; `age_s`: of the last row, `is_written`: whether a process has the file open."""
        of = "" if record is None else f" of {record.total_steps}"
        if record is not None and record.end is not None:
            return f"{self.name}: {record}, after step {self.step}{of}."
        told = f"{self.name}: step {self.step}{of} ended {_words(age_s)} ago"
        if age_s < max(LATE_S, LATE_STEPS * self.step_s):
            return f"{told}."
        late = f"{told}, and the last steps took up to {_words(self.step_s)}."
        if is_written():
            return f"{late} Its process is alive."
        return f"{late} It ended, or runs elsewhere: no process of yours here writes to it."


class LivePage:
    """What `rlhf3d watch` serves."""

    def __init__(self, runs: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        """ValueError for what cannot become the folder of a run."""
        for run in runs:
            check_may_be_run(run)
        self._runs, self._clock = list(runs), clock
        self._policy = watched_policy()
        self._lock = Lock()
        self._next = clock()
        self._stamps: list[tuple[Stamp, Stamp]] | None = None
        self._html = self._version = self._problem = ""
        self._progress: dict[Path, Progress] = {}
        self._served: Served | None = None

    def current(self) -> Served:
        """As it is now, or was at most `EVERY_S` (or four times what a look takes) ago."""
        with self._lock:
            began = self._clock()
            if self._served is None or began >= self._next:
                self._served = self._look()
                ended = self._clock()
                self._next = ended + max(EVERY_S, 4 * (ended - began))
            return self._served

    def _look(self) -> Served:
        stamps = [(_stamp(run / METRICS_FILE), _stamp(run / RECORD_FILE)) for run in self._runs]
        if stamps != self._stamps:
            # Before the files are read: what is written meanwhile is seen at the next look.
            self._stamps = stamps
            self._make(hashlib.blake2b(repr(stamps).encode(), digest_size=8).hexdigest())
        pairs = zip(self._runs, stamps, strict=True)
        status = [self._line(run, metrics) for run, (metrics, _) in pairs]
        if self._problem:
            status.insert(0, self._problem)
        html, version = self._html, self._version
        if not html:
            version = "waiting"
            html = render_waiting(version, status)
        return Served(html, version, status, self._policy)

    def _make(self, version: str) -> None:
        """Make the page of those runs that have rows."""
        try:
            found = [(run, rows) for run in self._runs if (rows := _rows(run))]
            views = view_all(found)
            pairs = zip(found, views, strict=True)
            self._progress = {run: _progress(view) for (run, _), view in pairs}
            self._html = render(views, version) if views else ""
        except (ValueError, OSError) as error:
            self._problem = f"The page is not up to date: {error}"
            return
        self._version, self._problem = version, ""

    def _line(self, run: Path, stamp: Stamp) -> str:
        progress, record = self._progress.get(run), read_record(run)
        if progress is not None and stamp is not None:
            path, age_s = run / METRICS_FILE, max(0.0, time.time() - stamp[0] / 1e9)
            return progress.line(record, age_s, lambda: has_open(path))
        if record is not None and record.end is not None:
            return f"{run}: {record}, before the first step."
        if not run.is_dir():
            return f"{run}: waits for the folder, which is not there yet."
        return f"{run}: waits for the first row of {METRICS_FILE}, which comes with the first step."


def check_may_be_run(run: Path) -> None:
    """ValueError for a file, or a folder with other things in it."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file, not the folder of a run (trainer.output_dir)")
    known = any((run / name).exists() for name in (METRICS_FILE, CONFIG_FILE))
    if run.is_dir() and not known and any(run.iterdir()):
        raise ValueError(
            f"{run} is not the folder of a run: it has neither {METRICS_FILE} nor {CONFIG_FILE}"
        )


def _words(seconds: float) -> str:
    """A time without more digits than matter."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _rows(run: Path) -> Rows:
    """None yet of a run that has only begun."""
    return read_metrics(run) if (run / METRICS_FILE).is_file() else []


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _progress(view: RunView) -> Progress:
    step_s = max(values(view.rows[-5:], STEP_TIME), default=0.0)
    return Progress(view.name, view.rows[-1]["step"], step_s)
