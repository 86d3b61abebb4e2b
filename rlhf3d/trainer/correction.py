"""The rollout correction of a step: from the configuration to two columns of the batch.

Invariant: only the actor's update sees them; rewards, advantages, the critic and the batch's statistics are of all
response tokens.
"""

from __future__ import annotations

from rlhf3d.algorithms.correction import importance_weights, mismatch_metrics, rejection_mask
from rlhf3d.algorithms.correction_settings import CorrectionSettings, correction_settings
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import UpdatePlan
from rlhf3d.config.schema import RolloutCorrectionConfig


def settings_of(config: RolloutCorrectionConfig) -> CorrectionSettings:
    """The correction that a configuration asks for."""
    return correction_settings(
        config.rollout_is,
        config.rollout_is_threshold,
        config.rollout_is_batch_normalize,
        config.rollout_rs,
        config.rollout_rs_threshold,
    )


def correct(
    batch: Batch, settings: CorrectionSettings, plan: UpdatePlan
) -> tuple[Batch, dict[str, float]]:
    """(the batch for the actor's update; `rollout_corr/…`): with `rollout_is_weights`, or a smaller `response_mask`.

    RuntimeError when rejection leaves one of the update's mini-batches without a token.
    """
    logprobs = (batch["old_logprobs"], batch["rollout_logprobs"], batch["response_mask"])
    metrics = mismatch_metrics(*logprobs)
    if settings.is_level is not None:
        weights, more = importance_weights(*logprobs, settings)
        batch = batch.with_columns(rollout_is_weights=weights)
        metrics |= more
    if settings.rejections:
        kept, more = rejection_mask(*logprobs, settings.rejections)
        for start in range(0, len(batch), plan.sequences_per_mini_batch):
            if not kept[start : start + plan.sequences_per_mini_batch].any():
                raise RuntimeError(
                    "algorithm.rollout_correction.rollout_rs: every token of a mini-batch of "
                    f"{plan.sequences_per_mini_batch} sequences was rejected ({more['rollout_rs_masked_fraction']:.0%} "
                    "of the step); widen rollout_rs_threshold, or look why the engines differ (training/rollout_*)"
                )
        batch = batch.with_columns(response_mask=kept)
        metrics |= more
    return batch, {f"rollout_corr/{name}": value for name, value in metrics.items()}
