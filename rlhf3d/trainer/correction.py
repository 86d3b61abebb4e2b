"""The rollout correction of a step: from the configuration to two columns of the batch.

Invariant: only the actor's update sees them; rewards, advantages, the critic and the batch's
statistics are of all response tokens.
"""

from __future__ import annotations

from torch import Tensor

from rlhf3d.algorithms.correction import importance_weights, mismatch_metrics, rejection_mask
from rlhf3d.algorithms.correction_settings import CorrectionSettings, correction_settings
from rlhf3d.algorithms.trajectories import RowPlaces, join_rows, row_places, split_rows
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


def mismatch(batch: Batch) -> dict[str, float]:
    """How far the engines' log-probs are from the trainer's, before any correction."""
    return _named(mismatch_metrics(*_logprobs(batch, row_places(batch.columns))))


def correct(
    batch: Batch, settings: CorrectionSettings, plan: UpdatePlan
) -> tuple[Batch, dict[str, float]]:
    """Return the batch for the actor's update, and metrics of what was changed in it.

    The batch gets a column `rollout_is_weights`, or a `response_mask` of fewer tokens. RuntimeError
    when rejection leaves one of the update's mini-batches without a token.
    """
    metrics: dict[str, float] = {}
    if settings.is_level is None and not settings.rejections:
        return batch, metrics
    places = row_places(batch.columns)
    logprobs = _logprobs(batch, places)
    if settings.is_level is not None:
        weights, more = importance_weights(*logprobs, settings)
        batch = batch.with_columns(rollout_is_weights=split_rows(weights, places))
        metrics |= more
    if settings.rejections:
        mask, more = rejection_mask(*logprobs, settings.rejections)
        _require_tokens(mask, plan.sequences_per_mini_batch, more["rollout_rs_masked_fraction"])
        batch = batch.with_columns(response_mask=split_rows(mask, places))
        metrics |= more
    return batch, _named(metrics)


def _logprobs(batch: Batch, places: RowPlaces | None) -> tuple[Tensor, Tensor, Tensor]:
    """Old log-probs, the engine's, and the mask, [T, R'] by trajectory.

    Products, means and verdicts of sequences are the trajectory's.
    """
    old, rollout = batch["old_logprobs"], batch["rollout_logprobs"]
    mask = join_rows(batch["response_mask"], places)
    return join_rows(old, places), join_rows(rollout, places), mask


def _named(metrics: dict[str, float]) -> dict[str, float]:
    return {f"rollout_corr/{name}": value for name, value in metrics.items()}


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
