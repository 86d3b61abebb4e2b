"""Health of a run: engine mismatch, the critic's fit, spikes, numbers that are not finite.

Invariant: they measure and never correct; what is undefined is NaN, not a pleasant number.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

import torch
from torch import Tensor

from rlhf3d.algorithms.kl import kl_estimate


def logprob_mismatch(
    rollout_logprobs: Tensor, train_logprobs: Tensor, mask: Tensor
) -> dict[str, float]:
    """Difference between the engine's log-probs and those of training, both [N, R].

    abs_diff_mean and abs_diff_max in nats; kl_k3, the k3 estimate of KL(rollout, train);
    prob_diff_mean and prob_diff_max of probabilities; pearson_r of probabilities (NaN when either
    is constant). ValueError without a response token.
    """
    inside = mask.bool()
    rollout, train = rollout_logprobs[inside].double(), train_logprobs[inside].double()
    if rollout.numel() == 0:
        raise ValueError(
            "no response token to compare log-probs on: every completion of the batch is empty"
        )
    diff = (rollout - train).abs()
    rollout_probs, train_probs = rollout.exp(), train.exp()
    prob_diff = (rollout_probs - train_probs).abs()
    return {
        "abs_diff_mean": float(diff.mean()),
        "abs_diff_max": float(diff.max()),
        "kl_k3": float(kl_estimate(rollout, train, "k3").mean()),
        "prob_diff_mean": float(prob_diff.mean()),
        "prob_diff_max": float(prob_diff.max()),
        "pearson_r": _pearson_r(rollout_probs, train_probs),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) inside the mask.

    1 is perfect, 0 no better than a constant. NaN when the returns do not vary. All [N, R].
    """
    inside = mask.bool()
    target, error = returns[inside].double(), (returns - values)[inside].double()
    # Not `var() > 0`: rounding can leave equal values a tiny variance, and a ratio of noise.
    if target.numel() < 2 or not bool((target != target[0]).any()):
        return math.nan
    return float(1.0 - error.var() / target.var())


class SpikeMonitor:
    """The ratio of a number to the median of the `window` values before it.

    The median is not moved by the spike itself; values that are not finite are not remembered.
    """

    def __init__(self, window: int = 20, least: int = 5) -> None:
        """Judge once `least` values are known."""
        self._least = least
        self._values: deque[float] = deque(maxlen=window)

    def ratio(self, value: float) -> float:
        """Return the ratio of `value` to the median before it, and remember it.

        NaN while too few values are known.
        """
        usual = median(self._values) if len(self._values) >= self._least else math.nan
        if math.isfinite(value):
            self._values.append(value)
        # NaN != 0 holds, and value / NaN is NaN.
        return value / usual if usual != 0 else math.nan

    def state_dict(self) -> list[float]:
        """What a checkpoint must keep."""
        return list(self._values)

    def load_state_dict(self, values: Iterable[float]) -> None:
        """Continue from `state_dict()`."""
        self._values.clear()
        self._values.extend(values)


def nonfinite_rows(columns: Mapping[str, Tensor], mask: Tensor) -> dict[int, list[str]]:
    """Row to the names of its columns that are NaN or infinite inside the mask.

    All columns and the mask are [N, R].
    """
    found: dict[int, list[str]] = {}
    inside = mask.bool()
    for name, column in columns.items():
        # A row with a broken number has no finite sum; few rows are looked at again.
        suspects = (~column.sum(-1).isfinite()).nonzero().flatten()
        # Outside the mask anything is allowed, and nothing is read.
        bad = (~column[suspects].isfinite() & inside[suspects]).any(-1)
        for row in suspects[bad].tolist():
            found.setdefault(row, []).append(name)
    return dict(sorted(found.items()))


def _pearson_r(x: Tensor, y: Tensor) -> float:
    if not (bool((x != x[0]).any()) and bool((y != y[0]).any())):
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
