"""What a run is made of, and the state of it that a checkpoint keeps besides the models.

Invariant: everything on the driver that a later step depends on is in `state_dict`.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.store import EXPERIENCE_FOLDER
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import NO_EXPERIENCE, ExperienceSource
from rlhf3d.placement.script import Script
from rlhf3d.trainer.best import BestTracker
from rlhf3d.trainer.checkpointing import CheckpointWriter
from rlhf3d.trainer.health import HealthMonitor
from rlhf3d.trainer.learner import Learner
from rlhf3d.trainer.preemption import PreemptionHandler
from rlhf3d.trainer.profiling import Profiler
from rlhf3d.trainer.step_log import StepLog
from rlhf3d.trainer.validation import Validation
from rlhf3d.trainer.weight_sync import WeightSync


@dataclass(frozen=True)
class RunComponents:
    """Built by `assembly.py`, used by the loop."""

    source: ExperienceSource
    learner: Learner
    weights: WeightSync
    validation: Validation
    checkpoints: CheckpointWriter
    best: BestTracker
    health: HealthMonitor
    log: StepLog
    preemption: PreemptionHandler
    script: Script | None = None
    """The run that this one repeats."""
    profiler: Profiler = field(default_factory=Profiler)
    prepare: Callable[[], None] = lambda: None
    """Gets the prompts of the next step ready, in any thread."""

    def validate(self, step: int) -> dict[str, float]:
        """Metrics on held-out prompts, also for the best checkpoint; empty without prompts."""
        # What older weights have to write comes before those that are looked at.
        self.source.settle(step)
        metrics = self.validation.run(step)
        if metrics:
            self.best.update(step, metrics)
        return metrics

    def save(self, step: int, metrics: dict[str, float], wait: bool) -> dict[str, float]:
        """Save all that a resume needs; with `wait` until the checkpoint is complete.

        `metrics`: the step's so far, for its row where the run is killed before that is written.
        """
        self.source.settle(step)
        with self.log.phase("save_checkpoint"):
            return self.checkpoints.save(
                step,
                self.weights.trained_version,
                lambda: self.state_dict() | {"metrics": metrics},
                self.best.of(metrics),
                last=step == self.log.total_steps,
                wait=wait,
                more=lambda checkpoint: self.source.save(checkpoint / EXPERIENCE_FOLDER),
            )

    def trained(self, step: int, experience: Experience) -> None:
        """A step is complete: write it down, and compare it with that of a run that is repeated."""
        self.log.trained(step, experience)
        if self.script is not None:
            self.script.trained(step, [one.trajectory.name for one in experience.trajectories])

    @contextmanager
    def saved_if_it_fails(
        self, step: int, metrics: dict[str, float], unsaved: bool
    ) -> Iterator[None]:
        """Save the last complete step, whose metrics these are, where the body gets no experience.

        `unsaved`: whether that is wanted, and not done yet; nothing is saved before the first step.
        """
        try:
            yield
        except NO_EXPERIENCE:
            # Raised before any weight changes: the models are still those of `step`.
            self.weights.sleep_engines()  # a save needs their memory
            if metrics and unsaved:
                self.save(step, metrics, wait=True)
                self.log.console.note(f"step {step} is saved: {self.checkpoints.last}")
            raise

    def state_dict(self) -> dict[str, Any]:
        """The driver's state after a step, as JSON: `loader`, `kl_controller` and these two."""
        return {
            **self.source.state_dict(),
            **self.learner.state_dict(),
            # The file's name for it, from before the monitor had its present one.
            "watch": self.health.state_dict(),
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], policy_version: int, folder: Path) -> None:
        """Continue after the step that `state` is of; `folder`: its checkpoint."""
        self.source.load_state_dict(state)
        ahead = folder / EXPERIENCE_FOLDER
        if ahead.is_dir():
            # Without it their prompts would be lost: the position in the data is after them.
            self.source.load(ahead)
        self.learner.load_state_dict(state)
        self.health.load_state_dict(state["watch"])
        self.best.load_state_dict(state["best"])
        self.weights.trained_version = policy_version
