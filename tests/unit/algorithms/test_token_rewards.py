"""Placement of scores on tokens and the KL penalty."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf3d.algorithms.rewards import apply_kl_penalty, token_level_rewards


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_score_sits_on_the_last_response_token(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    rewards = token_level_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert rewards.tolist() == [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 4]]


def test_only_scores_that_count_must_be_finite() -> None:
    mask = torch.tensor([[1.0], [0.0]])
    assert token_level_rewards(torch.tensor([1.0, math.nan]), mask).tolist() == [[1.0], [0.0]]
    with pytest.raises(ValueError, match=r"completions \[0\] are not finite"):
        token_level_rewards(torch.tensor([math.inf, 1.0]), mask)


def test_kl_penalty_by_hand() -> None:
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    rewards = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    logp = torch.tensor([[-1.0, -1.0], [-1.0, math.nan], [math.nan, math.nan]])
    ref = torch.tensor([[-1.5, -2.0], [-1.0, -1.0], [0.0, 0.0]])
    penalized, mean_kl = apply_kl_penalty(rewards, logp, ref, mask, 0.1, "k1")
    assert torch.allclose(penalized, torch.tensor([[-0.05, 0.9], [2.0, 0.0], [0.0, 0.0]]))
    assert mean_kl == pytest.approx((0.75 + 0.0) / 2)  # mean over the two non-empty sequences
