"""How generation and training lie in time: one after the other, or beside each other.

Invariant: the only place that says what may overlap. Pure: numbers only.

    in turn          sync | generate       | train on it     | sync | generate …
    between batches  sync | generate t + 1           | sync | generate t + 2 …
                          | train on t               |      | train on t + 1 …
    in flight        the same, and engines wait for no batch's longest completion
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.planning.job import Job
from rlhf3d.planning.search.phase_time import PhaseTime

Mode = Literal["in_turn", "between_batches", "in_flight"]
IDLE = {"cpu": ("environments",), "cuda": ("environments", "host")}
"""By kind of device, the parts of `generate` in which it has nothing to do: training on the same
devices goes on meanwhile."""
ALONE = {
    "in_turn": ("sync_weights", "save_checkpoint"),
    "between_batches": ("sync_weights", "score", "save_checkpoint"),
    "in_flight": ("sync_weights",),
}
"""Phases in which neither side goes on. Between batches the next batch begins when the one before
it is scored (by a reward model, on training ranks), and a save waits for the batches ahead; in
flight requests run on."""


@dataclass(frozen=True)
class Schedule:
    """Seconds of a step's two sides, and how they are put together.

    Between batches a bound of 2 versions or more takes, on average, as long as one of 1: what a
    longer queue evens out is the difference between steps, and mean lengths have none.
    """

    mode: Mode
    versions: int
    """rollout.max_staleness."""
    engines_s: float
    """Of the engines: a batch of completions."""
    training_s: float
    """Of the training ranks: log-probs, values, updates, and what else is not of `alone_s`."""
    shared_s: float
    """What generation takes of the training ranks' own devices, or cores, while they train; 0 with
    engines on devices of their own, and where each waits for the other anyway."""
    alone_s: float
    """Of phases in which neither goes on (`ALONE`)."""
    longest_s: float = 0.0
    """In flight: from asking for a batch to the end of its longest trajectory."""

    @property
    def overlapped_s(self) -> float:
        """Seconds in which the sides run beside each other: as long as the longer one takes.

        In flight a batch is asked for when a version is published, and trained on before `versions`
        + 1 others are: so many steps have room for its longest trajectory and its training.
        """
        sides = max(self.engines_s, self.training_s + self.shared_s)
        if self.mode != "in_flight":
            return sides
        return max(sides, (self.longest_s + self.training_s) / (self.versions + 1))

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        if self.mode == "in_turn":
            return self.engines_s + self.training_s + self.alone_s
        return self.overlapped_s + self.alone_s

    @property
    def engines_wait_s(self) -> float:
        """Of a step, the engines without requests to compute; phases of `alone_s` apart."""
        return self._rest(self.engines_s)

    @property
    def training_waits_s(self) -> float:
        """Of a step, the training ranks for samples; phases of `alone_s` apart."""
        return self._rest(self.training_s + self.shared_s)

    def _rest(self, busy_s: float) -> float:
        # The longer side waits for nothing: what is left of the sums is rounding.
        return max(0.0, self.step_s - self.alone_s - busy_s)


def mode_of(rollout: RolloutConfig) -> Mode:
    """Return what the configuration asks for."""
    return rollout.update if rollout.max_staleness else "in_turn"


def make_schedule(job: Job, phases: Iterable[PhaseTime]) -> Schedule:
    """Return the schedule of a job's phases."""
    mode = mode_of(job.config.rollout)
    engines_s = training_s = shared_s = alone_s = longest_s = 0.0
    for phase in phases:
        if phase.phase == "generate":
            engines_s, longest_s = phase.total, phase.longest_s
            shared_s = _shared_s(job, phase)
        elif phase.phase in ALONE[mode]:
            alone_s += phase.total
        else:
            training_s += phase.total
    versions = job.config.rollout.max_staleness
    return Schedule(mode, versions, engines_s, training_s, shared_s, alone_s, longest_s)


def _shared_s(job: Job, generate: PhaseTime) -> float:
    """What of `generate` keeps devices busy that training wants at the same time.

    Two processes on one GPU take turns, and on CPU all share the cores.
    """
    own_devices = job.on_gpu and not job.colocated
    if own_devices or mode_of(job.config.rollout) == "in_turn":
        return 0.0
    idle = IDLE[job.cluster.hardware.kind]
    return sum(seconds for part, seconds in generate.parts.items() if part not in idle)
