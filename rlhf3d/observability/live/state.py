"""What a run is at, as a value: what the live view shows.

Invariant: a `RunState` never changes; each event of the run gives a new one. Times are given, in
seconds of one clock.
Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from rlhf3d.observability.metrics import STEP_TIME, phase_totals, validation_accuracy

TREND_STEPS = 120
"""Steps that a trend covers."""
RECENT_STEPS = 10
"""Steps that the time left and the shares of time are taken from, and runs of a phase that say how
long it usually takes."""
SLOW_FACTOR, SLOW_S = 2.0, 15.0
"""A phase is slow once it has taken this many times its longest run before, and these seconds
more than that."""


@dataclass(frozen=True)
class Waited:
    """Whom the driver waits for."""

    pending: Collection[str]
    """Names of those who have not answered; it shrinks while replies come."""
    since: float
    timeout_s: float
    """The deadline, counted from `since`."""

    @property
    def names(self) -> list[str]:
        """Those who have not answered by now."""
        # One call, which no other thread comes between.
        return list(self.pending)


@dataclass(frozen=True)
class MemoryPlanned:
    """What the plan says of memory, in GiB."""

    rank: float
    """Of the training rank that needs most, at its peak."""
    host: float
    """Of everything of the run on a node."""


@dataclass(frozen=True)
class RunState:
    """A run after the events so far."""

    step: int = 0
    """The last one that is complete."""
    total: int | None = None
    phase: str = ""
    """The one that runs; "" between two."""
    phase_began: float = 0.0
    rows: tuple[Mapping[str, Any], ...] = ()
    """Metrics of the last steps."""
    held_out: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    """Accuracies of the validations so far, by data source and measure."""
    runs_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """How long each phase took, the last times it ran."""
    step_ended: float = 0.0
    planned: MemoryPlanned | None = None

    def phase_begins(self, name: str, now: float) -> RunState:
        """A phase runs from now on."""
        return replace(self, phase=name, phase_began=now)

    def phase_ends(self, now: float) -> RunState:
        """The phase is over."""
        runs = (*self.runs_s.get(self.phase, ()), now - self.phase_began)[-RECENT_STEPS:]
        return replace(self, phase="", phase_began=now, runs_s={**self.runs_s, self.phase: runs})

    def step_ends(self, metrics: Mapping[str, Any], step: int, total: int, now: float) -> RunState:
        """A step is complete, with its metrics."""
        rows = (*self.rows, dict(metrics))[-TREND_STEPS:]
        return replace(self, rows=rows, step=step, total=total, step_ended=now)

    def resumed(self, rows: Sequence[Mapping[str, Any]], now: float) -> RunState:
        """A run goes on after these rows of its metrics."""
        state = self
        for row in rows:
            state = state.validated(row)
        steps = tuple(dict(row) for row in rows if row["step"] > 0)
        return replace(state, rows=steps[-TREND_STEPS:], step_ended=now)

    def validated(self, metrics: Mapping[str, Any]) -> RunState:
        """Held-out prompts were answered."""
        held_out = dict(self.held_out)
        for key, accuracy in validation_accuracy(metrics).items():
            held_out[key] = (*held_out.get(key, ()), accuracy)
        return replace(self, held_out=held_out)

    @property
    def recent(self) -> tuple[Mapping[str, Any], ...]:
        """Rows of the last few steps."""
        return self.rows[-RECENT_STEPS:]

    @property
    def left_s(self) -> float | None:
        """Seconds from the end of the last step to that of the run, where that can be said."""
        seconds = [row[STEP_TIME] for row in self.recent if STEP_TIME in row]
        if not seconds or self.total is None:
            return None
        return (self.total - self.step) * fmean(seconds)

    def shares(self) -> dict[str, float]:
        """Shares of the last steps' time by phase, the largest first, `other` for the rest."""
        total = sum(row.get(STEP_TIME, 0.0) for row in self.recent)
        if not total:
            return {}
        sums = phase_totals(self.recent)
        # Not below 0: phases of a validation before the first step are in no step.
        sums["other"] = max(0.0, total - sums.total())
        return {phase: seconds / total for phase, seconds in sums.most_common()}

    def usual_s(self) -> float | None:
        """The longest that the running phase took before."""
        return max(self.runs_s.get(self.phase, ()), default=None)

    def is_slow(self, now: float, waited: Waited | None) -> bool:
        """Whether the phase takes much longer than before, or half of a wait's deadline is over."""
        ran_s, usual_s = now - self.phase_began, self.usual_s()
        if not self.phase:
            return False
        if usual_s is not None and ran_s > max(SLOW_FACTOR * usual_s, usual_s + SLOW_S):
            return True
        return waited is not None and now - waited.since > waited.timeout_s / 2
