"""The rollout correction of a step: what the actor's update gets to see."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf3d.algorithms.aggregation import loss_norm
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.schema import RolloutCorrectionConfig
from rlhf3d.trainer.correction import correct, mismatch, settings_of


def batch() -> Batch:
    """Ratios 4 and 1 | 1."""
    rows = from_sequences([[1]] * 2, [[5, 6], [7]], 0, rollout_logprobs=[[-2.0, -1.0], [-1.0]])
    return rows.with_columns(
        old_logprobs=rows["rollout_logprobs"] + torch.tensor([[math.log(4), 0], [0, 0]])
    )


def plan(sequences: int) -> UpdatePlan:
    return UpdatePlan(2 // sequences, sequences, MicroBatching(rows=1), 1, 1)


def test_nothing_asked_is_measured_only() -> None:
    before = batch()
    rows, metrics = correct(before, settings_of(RolloutCorrectionConfig()), plan(2))
    assert rows is before and metrics == {}
    assert mismatch(before)["rollout_corr/kl"] == pytest.approx(-math.log(4) / 3)


def test_weights_and_rejection() -> None:
    asked = RolloutCorrectionConfig(
        rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold="0.5_2.0"
    )
    rows, metrics = correct(batch(), settings_of(asked), plan(2))
    assert rows["rollout_is_weights"].tolist() == [[2, 1], [1, 0]]
    assert rows["response_mask"].tolist() == [[0, 1], [1, 0]]
    assert loss_norm(rows["response_mask"], 9).tokens == 2
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(1 / 3)
    assert rows["response_lengths"].tolist() == [2, 1], "the model still reads every token"


def test_a_mini_batch_without_tokens_is_an_error() -> None:
    asked = settings_of(RolloutCorrectionConfig(rollout_rs="seq_sum_k1", rollout_rs_threshold=2.0))
    assert correct(batch(), asked, plan(2))[0]["response_mask"].sum() == 1
    with pytest.raises(
        RuntimeError, match=r"every token of a mini-batch of 1 sequences was rejected \(67% of the"
    ):
        correct(batch(), asked, plan(1))
