"""From per-token losses to the scalar that is back-propagated.

Invariant: the divisors are counts of the complete mini-batch over all data-parallel ranks, passed
in as data; so the results of any split into micro-batches and ranks add up to its loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf3d.algorithms.masked import masked_mean, masked_sum
from rlhf3d.algorithms.names import AGGREGATION_MODES
from rlhf3d.algorithms.registry import unknown_name


@dataclass(frozen=True)
class LossNorm:
    """Counts of one global mini-batch; ValueError unless all are positive."""

    tokens: float
    """Response tokens."""
    sequences: float
    """Trajectories with at least one response token, however many rows each has."""
    max_response_tokens: int
    """data.max_response_length, the constant divisor of seq-mean-token-sum-norm."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.sequences, self.max_response_tokens) <= 0:
            raise ValueError(f"a mini-batch without response tokens has no loss: {self}")


def loss_norm(response_mask: Tensor, max_response_tokens: int) -> LossNorm:
    """Counts of the mini-batch with `response_mask` [B, R], which must be the global one.

    A row of it is a complete trajectory (`trajectories.join_rows`).
    """
    tokens = response_mask.bool().sum(-1)
    return LossNorm(float(tokens.sum()), float((tokens > 0).sum()), max_response_tokens)


def aggregate(
    per_token: Tensor,
    response_mask: Tensor,
    mode: str,
    norm: LossNorm,
    trajectory_tokens: Tensor | None = None,
) -> Tensor:
    """The share [] of the global loss that these rows contribute.

    The rows are [b, R] of the mini-batch that `norm` counts. token-mean divides the sum by tokens,
    token-sum by nothing, seq-mean-token-sum by sequences; seq-mean-token-mean averages over
    sequences their token means; seq-mean-token-sum-norm divides the sum by sequences and
    max_response_tokens (Dr.GRPO, arXiv 2503.20783; verl's mode of this name with its
    loss_scale_factor at max_response_tokens). A sequence is a trajectory: where some have several
    rows, `trajectory_tokens` [b] are the response tokens of each row's complete trajectory, and its
    rows may be in any micro-batch. Back-propagate every share and sum the gradients over
    micro-batches and data-parallel ranks. ValueError for another mode.
    """
    if mode == "token-mean":
        return masked_sum(per_token, response_mask) / norm.tokens
    if mode == "token-sum":
        return masked_sum(per_token, response_mask)
    if mode == "seq-mean-token-sum":
        return masked_sum(per_token, response_mask) / norm.sequences
    if mode == "seq-mean-token-mean":
        # An empty row adds 0 here, and `norm.sequences` does not count it.
        if trajectory_tokens is not None:
            sums = masked_sum(per_token, response_mask, dim=-1)
            return (sums / trajectory_tokens.clamp(min=1)).sum() / norm.sequences
        return masked_mean(per_token, response_mask, dim=-1).sum() / norm.sequences
    if mode == "seq-mean-token-sum-norm":
        return masked_sum(per_token, response_mask) / (norm.sequences * norm.max_response_tokens)
    raise unknown_name("loss_agg_mode", mode, AGGREGATION_MODES)
