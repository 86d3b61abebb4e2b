"""What a step writes of itself, and its figures, worked out while ranks compute.

Invariant: each part reads what is complete when it is asked for, and changes nothing of it.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlhf3d.batching.batch import Batch
from rlhf3d.experience.scored import Experience
from rlhf3d.trainer.aside import Aside
from rlhf3d.trainer.metrics import rollout_metrics, training_metrics
from rlhf3d.trainer.staleness import fresh_tokens, staleness_metrics
from rlhf3d.trainer.step_log import StepLog


@dataclass(frozen=True)
class StepFigures:
    """What a configuration asks of them; `version`: of the policy that a step trains."""

    log: StepLog
    overlong: bool
    """Whether responses pay for their length (`reward.overlong_buffer`)."""
    max_response_length: int
    off_policy: bool
    """Whether another version than the trained one may have written tokens."""

    def of_rollouts(self, experience: Experience, version: int) -> dict[str, float]:
        """Figures of what was generated."""
        metrics = rollout_metrics(experience, self.overlong, self.max_response_length)
        return metrics | staleness_metrics(experience, version) if self.off_policy else metrics

    def of_tokens(
        self, step: int, experience: Experience, batch: Batch, version: int
    ) -> dict[str, float]:
        """Write who wrote which token; figures of all of them. The batch has old log-probs."""
        self.log.tokens(step, experience, batch, version)
        return training_metrics(batch, fresh_tokens(experience, version))


class StepAside(Aside):
    """What goes on beside one step."""

    def __init__(
        self, figures: StepFigures, step: int, experience: Experience, version: int
    ) -> None:
        """Begin with what is known of generated trajectories."""
        super().__init__()
        self._figures, self._step = figures, step
        self._experience, self._version = experience, version
        # Written whatever the checks say: their messages name lines of this file.
        self.start(lambda: figures.log.samples(step, experience.samples))
        self._rollouts = self.start(figures.of_rollouts, experience, version)
        self._tokens: Callable[[], dict[str, float]] | None = None

    def tokens(self, batch: Batch) -> None:
        """Begin with what is known of tokens, as soon as the batch has old log-probs."""
        if self._tokens is None and "old_logprobs" in batch:
            self._tokens = self.start(
                self._figures.of_tokens, self._step, self._experience, batch, self._version
            )

    def figures(self) -> dict[str, float]:
        """All of them; waits for those that are still worked out."""
        assert self._tokens is not None, "the update gives the old log-probs that nothing else did"
        return self._tokens() | self._rollouts()
