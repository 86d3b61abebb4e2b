"""What the user sees while a run works: header, a line per step, a live bar, validation, samples.

Invariant: where the output is not a terminal it is plain lines without control characters, and text
that a model wrote never reaches the terminal with control characters in it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from rlhf3d.observability.metrics import STEP_TIME, TIMING, validation_accuracy, validation_reward
from rlhf3d.observability.samples import Sample, printable
from rlhf3d.terminal import Terminal
from rlhf3d.units import format_clock

STEP_FIELDS = (
    # z: what rounds to zero has no minus sign.
    ("reward", "critic/score/mean", "z.3f"),
    ("len", "response_length/mean", ".0f"),
    ("kl", "actor/ppo_kl", "z.4f"),
    ("mismatch", "training/rollout_probs_diff_mean", "z.4f"),
    ("stale", "training/off_policy/trajectory_staleness_worst/mean", ".1f"),
)
"""(label, metric, format) of the step line; a metric the step lacks is left out."""

STEP_PHASES = (
    ("gen", ("generate",)),
    ("upd", ("update_critic", "update_actor")),
    ("sync", ("sync_weights",)),
)
"""(label, phases added up) of the step line."""

_SEPARATOR = " │ "
_PLAIN_WIDTH = 110
_ETA_STEPS = 10


class Console:
    """Terminal output of one run.

    Use as a context manager, so that an error leaves a sane terminal.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to `file` (None: standard output); `interactive` None: if that is a terminal."""
        if interactive is None:
            # A dumb terminal cannot redraw a line.
            interactive = (file or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"
        self._rich = (
            Terminal(file=file, force_terminal=True, highlight=False)
            if interactive
            else Terminal(file=file, force_terminal=False, color_system=None, width=_PLAIN_WIDTH)
        )
        self._interactive = interactive
        self._clock = clock
        self._began = clock()
        self._step_seconds: deque[float] = deque(maxlen=_ETA_STEPS)
        self._step = 0
        self._total: int | None = None
        self._steps_printed = 0
        self._progress: Progress | None = None

    def header(
        self, lines: Sequence[str], total_steps: int | None = None, done_steps: int = 0
    ) -> None:
        """Print the description of the run.

        `total_steps` and the steps a resumed run has behind it set the bar.
        """
        self._step, self._total = done_steps, total_steps
        for line in lines:
            self._line(line)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show the running phase.

        Live in a terminal; in a log one line each until the first step is out.
        """
        if self._interactive:
            self._show(name)
        # Later in a log the step lines alone show that it goes on.
        elif self._steps_printed == 0:
            self._line(f"[{format_clock(self._clock() - self._began)}] {name} …")
        try:
            yield
        finally:
            if self._progress is not None:
                self._show("")

    def step(self, metrics: Mapping[str, Any], step: int, total: int) -> None:
        """Print the line of a finished step.

        Its time and the ETA need `timing_s/step` among the metrics.
        """
        self._step, self._total = step, total
        self._steps_printed += 1
        if STEP_TIME in metrics:
            self._step_seconds.append(metrics[STEP_TIME])
        self._line(step_line(metrics, step, total, self._eta_s()))
        if self._progress is not None:
            self._show("")

    def note(self, text: str) -> None:
        """Print something that the user should know, above the bar."""
        self._line(f"note: {text}")

    def validation(self, name: str, metrics: Mapping[str, Any]) -> None:
        """Print held-out accuracies and a reward model's mean scores, as `name` (`before`)."""
        parts = [
            f"{printable(s)} {m} {value:.1%}"
            for (s, m), value in validation_accuracy(metrics).items()
        ]
        parts += [
            f"{printable(s)} {m} reward model {value:.3f}"
            for (s, m), value in validation_reward(metrics).items()
        ]
        self._line(_SEPARATOR.join([f"validate {name}", *parts]))

    def samples(self, before: Sequence[Sample], after: Sequence[Sample]) -> None:
        """Print answers to the same prompts side by side; both lists are in the same order."""
        table = Table(title="The same held-out prompts, before and after", show_lines=True)
        for heading in ("prompt", "answer", "before", "after"):
            table.add_column(heading, overflow="fold")
        for old, new in zip(before, after, strict=True):
            answers = [f"[{sample.mark}] {sample.answer}" for sample in (old, new)]
            cells = [old.prompt, old.ground_truth, *answers]
            table.add_row(*(Text(printable(text)) for text in cells))
        with self._whoever_reads():
            self._rich.print(table)

    def done(self, summary: Sequence[str]) -> None:
        """Remove the bar and print the results of the run."""
        self.close()
        for line in summary:
            self._line(line)

    def close(self) -> None:
        """Remove the bar and restore the terminal."""
        if self._progress is not None:
            with self._whoever_reads():
                self._progress.stop()
            self._progress = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, text: str) -> None:
        with self._whoever_reads():
            # One line in a log stays one line, however wide.
            self._rich.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def _whoever_reads(self) -> Iterator[None]:
        """A terminal that has gone away is no reason to end a run."""
        try:
            yield
        except OSError:
            # From here on rich writes nothing, so that this happens once.
            self._rich.quiet = True

    def _eta_s(self) -> float | None:
        if not self._step_seconds or self._total is None:
            return None
        return (self._total - self._step) * sum(self._step_seconds) / len(self._step_seconds)

    def _show(self, phase: str) -> None:
        """Redraw the bar for `phase`, which begins now ("" between phases)."""
        with self._whoever_reads():
            if self._progress is None:
                columns = (
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    BarColumn(None),
                )
                self._progress = Progress(
                    *columns,
                    _LiveColumn(self._clock),
                    console=self._rich,
                    transient=True,
                    refresh_per_second=4,
                )
                self._progress.add_task("")
                self._progress.start()
            now, eta_s = self._clock(), self._eta_s()
            steps = "" if self._total is None else f"{self._step}/{self._total} steps"
            # As times of the clock: `_LiveColumn` counts on while a phase blocks this thread.
            ends_at = None if eta_s is None else now + eta_s
            self._progress.update(
                self._progress.task_ids[0],
                description=steps,
                total=self._total,
                completed=self._step,
                phase=phase,
                phase_began=now,
                ends_at=ends_at,
            )


class _LiveColumn(ProgressColumn):
    """The running phase with its seconds, and the time left: both move while the phase runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        now = self._clock()
        parts = []
        if task.fields.get("phase"):
            parts.append(f"{task.fields['phase']} {now - task.fields['phase_began']:.0f}s")
        if task.fields.get("ends_at") is not None:
            parts.append(f"eta {format_clock(max(0.0, task.fields['ends_at'] - now))}")
        return Text(", ".join(parts))


def step_line(metrics: Mapping[str, Any], step: int, total: int, eta_s: float | None = None) -> str:
    """Return one readable line.

    `step 12/40 │ reward 0.340 │ len 31 │ … │ gen 5.1s upd 18.2s │ 26 s, eta 12:10`.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    parts += [
        f"{label} {metrics[name]:{spec}}" for label, name, spec in STEP_FIELDS if name in metrics
    ]
    seconds = []
    for label, phases in STEP_PHASES:
        ran = [metrics[TIMING + phase] for phase in phases if TIMING + phase in metrics]
        if ran:
            seconds.append(f"{label} {sum(ran):.1f}s")
    if seconds:
        parts.append(" ".join(seconds))
    if STEP_TIME in metrics:
        eta = "" if eta_s is None else f", eta {format_clock(eta_s)}"
        parts.append(f"{metrics[STEP_TIME]:.0f} s{eta}")
    return _SEPARATOR.join(parts)
