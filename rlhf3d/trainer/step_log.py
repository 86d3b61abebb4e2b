"""What each step took and gave: seconds of its phases, completions, and its row of metrics.

Invariant: everything that a step reports goes to `metrics.jsonl` in one row, and what the console
shows is from that row.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf3d.batching.batch import Batch
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.machine import used_gib
from rlhf3d.observability.console import Console
from rlhf3d.observability.metrics import MetricsWriter, PhaseTimer
from rlhf3d.observability.profile.recorder import span
from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.trainer.metrics import throughput_metrics


@dataclass(frozen=True)
class StepLog:
    """Console and metrics file of a run."""

    console: Console
    writer: MetricsWriter
    total_steps: int
    devices: int
    """What throughput is divided by."""
    recorder: TokenRecorder
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    journal: JournalWriter | None = None

    def begin(self) -> None:
        """Count seconds from now on: what came before, such as engines' start, is in no row."""
        self.timer.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase as `timing_s/NAME` and show its name."""
        with self.timer.phase(name), self.console.phase(name), span(name, "phase"):
            yield

    def samples(self, step: int, samples: Sequence[Sample], kind: Kind = "train") -> None:
        """Write the completions of a step, or of a validation."""
        self.writer.samples(step, samples, kind)

    def tokens(self, step: int, experience: Experience, batch: Batch, version: int) -> None:
        """Write the tokens of a step's first trajectories; `batch` has the column old_logprobs.

        `version`: of the policy that is trained.
        """
        if self.recorder.count:
            self.writer.tokens(step, self.recorder.records(experience, batch, version))

    def trained(self, step: int, experience: Experience) -> None:
        """Write down that a step is complete, and on which trajectories it has trained."""
        if self.journal is not None:
            names = [one.trajectory.name for one in experience.trajectories]
            self.journal.trained(step, names, experience.ended)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's row, with the seconds since the row before; step 0 is before training."""
        metrics |= self.timer.pop()
        if step > 0:
            metrics |= throughput_metrics(metrics, self.devices)
            metrics["perf/host_memory_gib"] = used_gib()
            self.console.step(metrics, step, self.total_steps)
        self.writer.write(step, metrics)
