"""The rollout correction of a step: from the configuration to two columns of the batch.

Invariant: only the actor's update sees them; rewards, advantages, the critic and the batch's
statistics are of all response tokens.
"""

from __future__ import annotations

from torch import Tensor

from rlhf3d.algorithms.correction import importance_weights, mismatch_metrics, rejection_mask
from rlhf3d.algorithms.correction_settings import CorrectionSettings, correction_settings
from rlhf3d.algorithms.trajectories import join_rows, row_places, split_rows
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
    """Return the batch for the actor's update, and metrics (`rollout_corr/…`).

    The batch gets a column `rollout_is_weights`, or a `response_mask` of fewer tokens. RuntimeError
    when rejection leaves one of the update's mini-batches without a token.
    """
    places = row_places(batch.columns)
    # [T, R'] by trajectory: products, means and verdicts of sequences are the trajectory's.
    logprobs = (
        join_rows(batch["old_logprobs"], places),
        join_rows(batch["rollout_logprobs"], places),
        join_rows(batch["response_mask"], places),
    )
    metrics = mismatch_metrics(*logprobs)
    if settings.is_level is not None:
        weights, more = importance_weights(*logprobs, settings)
        batch = batch.with_columns(rollout_is_weights=split_rows(weights, places))
        metrics |= more
    if settings.rejections:
        mask, more = rejection_mask(*logprobs, settings.rejections)
        _require_tokens(mask, plan.sequences_per_mini_batch, more["rollout_rs_masked_fraction"])
        batch = batch.with_columns(response_mask=split_rows(mask, places))
        metrics |= more
    return batch, {f"rollout_corr/{name}": value for name, value in metrics.items()}


def _require_tokens(mask: Tensor, sequences: int, rejected: float) -> None:
    """RuntimeError where a mini-batch of `sequences` has no token: its loss is 0 / 0.

    `mask` [T, R'] is by trajectory.
    """
    # The update's mini-batches are these runs of consecutive trajectories.
    for start in range(0, len(mask), sequences):
        if not mask[start : start + sequences].any():
            raise RuntimeError(
                "algorithm.rollout_correction.rollout_rs: every token of a mini-batch of "
                f"{sequences} sequences was rejected ({rejected:.0%} of the step); widen "
                "rollout_rs_threshold, or look why the engines differ (training/rollout_*) or how "
                "much training has changed since tokens were written (training/off_policy/*)"
            )
