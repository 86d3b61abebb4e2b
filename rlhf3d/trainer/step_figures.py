"""A step's figures, in the two parts that can be worked out while ranks compute.

Invariant: each part reads what is complete when it is asked for, and changes nothing of it.
Runs in: driver.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf3d.batching.batch import Batch
from rlhf3d.experience.scored import Experience
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
