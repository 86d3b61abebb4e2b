"""Numbers that tell whether training can be trusted: engine mismatch and the critic's fit.

Invariant: they measure and never correct; what is undefined is NaN, not a pleasant number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf3d.algorithms.kl import kl_estimate


def logprob_mismatch(rollout_logprobs: Tensor, train_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Difference between the log-probs the engine sampled with and those training computes, both [N, R].

    abs_diff_mean and abs_diff_max in nats; kl_k3, the k3 estimate of KL(rollout, train); prob_diff_mean and
    prob_diff_max of probabilities; pearson_r of probabilities (NaN when either is constant). ValueError
    without a response token.
    """
    inside = mask.bool()
    rollout, train = rollout_logprobs[inside].double(), train_logprobs[inside].double()
    if rollout.numel() == 0:
        raise ValueError("no response token to compare log-probs on: every completion of the batch is empty")
    diff = (rollout - train).abs()
    prob_diff = (rollout.exp() - train.exp()).abs()
    return {
        "abs_diff_mean": float(diff.mean()),
        "abs_diff_max": float(diff.max()),
        "kl_k3": float(kl_estimate(rollout, train, "k3").mean()),
        "prob_diff_mean": float(prob_diff.mean()),
        "prob_diff_max": float(prob_diff.max()),
        "pearson_r": _pearson_r(rollout.exp(), train.exp()),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) inside the mask: 1 is perfect, 0 no better than a constant.

    NaN when the returns do not vary. All [N, R].
    """
    inside = mask.bool()
    target, error = returns[inside].double(), (returns - values)[inside].double()
    if target.numel() < 2 or not bool((target != target[0]).any()):
        return math.nan
    return float(1.0 - error.var() / target.var())


def _pearson_r(x: Tensor, y: Tensor) -> float:
    if not (bool((x != x[0]).any()) and bool((y != y[0]).any())):
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
