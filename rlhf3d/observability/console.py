"""What the user sees while a run works: header, a line per step, a live view, validation, samples.

Invariant: where the output is not a terminal it is plain lines without control characters, and text
that a model wrote never reaches the terminal with control characters in it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from rlhf3d.observability.live.picture import picture
from rlhf3d.observability.live.screen import Captured, LiveTerminal, Screen, fit
from rlhf3d.observability.live.state import MemoryPlanned, RunState, Waited
from rlhf3d.observability.metrics import (
    KL_TO_REFERENCE,
    STEP_TIME,
    TIMING,
    validation_accuracy,
    validation_reward,
)
from rlhf3d.observability.samples import Sample, printable
from rlhf3d.terminal import Terminal
from rlhf3d.units import format_clock

STEP_FIELDS = (
    # z: what rounds to zero has no minus sign.
    ("reward", "critic/score/mean", "z.3f"),
    ("len", "response_length/mean", ".0f"),
    *(("kl_ref", name, "z.4f") for name in KL_TO_REFERENCE),
    ("kl", "actor/ppo_kl", "z.4f"),
    ("mismatch", "training/rollout_probs_diff_mean", "z.4f"),
    ("stale", "training/off_policy/trajectory_staleness_worst/mean", ".1f"),
)
"""(label, metric, format) of the step line; a metric the step lacks is left out, and of the KLs all
but the first that is known."""

STEP_PHASES = (
    ("gen", ("generate",)),
    ("upd", ("update_critic", "update_actor")),
    ("sync", ("sync_weights",)),
)
"""(label, phases added up) of the step line."""

_SEPARATOR = " │ "
_PLAIN_WIDTH = 110


class Console:
    """Terminal output of one run.

    Use as a context manager, so that an error leaves a sane terminal.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], Waited | None] = lambda: None,
    ) -> None:
        """Write to `file` (None: standard output); `interactive` None: if that can show a view.

        `waited`: whom the run waits for at the moment; another thread asks, on the same clock.
        """
        self._interactive = _can_show(file or sys.stdout) if interactive is None else interactive
        self._rich = (
            LiveTerminal(file=file, force_terminal=True, highlight=False)
            if self._interactive
            else Terminal(file=file, force_terminal=False, color_system=None, width=_PLAIN_WIDTH)
        )
        self._clock, self._waited = clock, waited
        self._began = clock()
        # Only the run's own thread sets it; the thread that draws reads it.
        self._state = RunState(phase_began=self._began)
        self._steps_printed = 0
        # What is printed around the view must not be torn by others who write to the terminal.
        self._captured = Captured(self._print) if self._interactive and file is None else None
        self._screen: Screen | None = None

    def header(
        self,
        lines: Sequence[str],
        total_steps: int | None = None,
        done_steps: int = 0,
        planned: MemoryPlanned | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Print the description of the run, below which a terminal shows the view from now on.

        `total_steps` and the steps a resumed run has behind it set its bar; `planned`: the memory
        that the view shows beside what is measured; `rows`: the metrics of a resumed run so far.
        """
        state = replace(self._state, step=done_steps, total=total_steps, planned=planned)
        self._state = state.resumed(rows, self._clock())
        for line in lines:
            self._line(line)
        if self._interactive:
            self._screen = Screen(self._rich, self._picture)
            with self._whoever_reads():
                self._screen.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show the running phase.

        Live in a terminal; in a log one line each until the first step is out.
        """
        # Later in a log the step lines alone show that it goes on.
        if not self._interactive and self._steps_printed == 0:
            self._line(f"[{format_clock(self._clock() - self._began)}] {name} …")
        self._state = self._state.phase_begins(name, self._clock())
        try:
            yield
        finally:
            self._state = self._state.phase_ends(self._clock())

    def step(self, metrics: Mapping[str, Any], step: int, total: int) -> None:
        """Print the line of a finished step.

        Its time and the ETA need `timing_s/step` among the metrics.
        """
        self._steps_printed += 1
        self._state = self._state.step_ends(metrics, step, total, self._clock())
        self._line(step_line(metrics, step, total, self._state.left_s))

    def note(self, text: str) -> None:
        """Print something that the user should know, above the view."""
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
        self._state = self._state.validated(metrics)
        self._line(_SEPARATOR.join([f"validate {name}", *parts]))

    def samples(self, before: Sequence[Sample], after: Sequence[Sample]) -> None:
        """Print answers to the same prompts side by side; both lists are in the same order."""
        table = Table(title="The same held-out prompts, before and after", show_lines=True)
        for heading in ("prompt", "answer", "before", "after"):
            table.add_column(heading, overflow="fold")
        for old, new in zip(before, after, strict=True):
            answers = [f"[{sample.mark}] {sample.transcript}" for sample in (old, new)]
            cells = [old.prompt, old.ground_truth, *answers]
            table.add_row(*(Text(printable(text)) for text in cells))
        with self._whoever_reads():
            self._rich.print(table)

    def done(self, summary: Sequence[str]) -> None:
        """Remove the view and print the results of the run."""
        self.close()
        for line in summary:
            self._line(line)

    def close(self) -> None:
        """Remove the view."""
        if self._screen is not None:
            with self._whoever_reads():
                self._screen.stop()
            self._screen = None

    def __enter__(self) -> Console:
        if self._captured is not None:
            self._rich.file = self._captured.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._captured is not None:
            self._captured.stop()
            self._captured = None
            with self._whoever_reads():
                self._rich.file.close()

    def _line(self, text: str) -> None:
        self._print(Text(text))

    def _print(self, text: Text) -> None:
        """Print a line, from any thread."""
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

    def _picture(self) -> Text:
        """The view of now."""
        fit(self._rich)
        width, height = self._rich.size
        return picture(self._state, self._clock(), width, height, self._waited())


def _can_show(file: TextIO) -> bool:
    """Whether a file is a terminal that can draw over what it shows, and whose user wants that."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    characters = (file.encoding or "").lower().replace("-", "")
    return file.isatty() and not unwanted and characters == "utf8"


def step_line(metrics: Mapping[str, Any], step: int, total: int, eta_s: float | None = None) -> str:
    """Return one readable line.

    `step 12/40 │ reward 0.340 │ len 31 │ … │ gen 5.1s upd 18.2s │ 26 s, eta 12:10`.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    fields: dict[str, str] = {}
    for label, name, spec in STEP_FIELDS:
        if name in metrics:
            # One of the KLs.
            fields.setdefault(label.partition("_")[0], f"{label} {metrics[name]:{spec}}")
    parts += fields.values()
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


@contextmanager
def reported_only(console: Console, what: str, then: str) -> Iterator[None]:
    """Report an error of the body as a warning that `what` failed, and `then`."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).exception(what)
        first_line = str(error).partition("\n")[0]
        console.note(f"warning: {what} ({type(error).__name__}: {first_line}); {then}")
