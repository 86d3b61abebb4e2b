"""Where a completion's score sits among its tokens, and the KL penalty on them.

Invariant: a score is on the last response token or nowhere, a turn's reward on the turn's last;
nothing is written outside the mask. A row is a complete trajectory (`trajectories.join_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf3d.algorithms.kl import kl_estimate
from rlhf3d.algorithms.masked import by_rows, masked_mean, zero_outside


def token_level_rewards(
    scores: Tensor, response_mask: Tensor, turn_rewards: Tensor | None = None
) -> Tensor:
    """Token rewards [N, R] with `scores` [N] on each row's last response token, 0 elsewhere.

    An empty response has no token to carry its score, so it carries none. `turn_rewards` [N, R],
    each on its turn's last token, are added (verl masks what tools wrote alike, and has one score a
    response). ValueError when the score of a non-empty response, or the reward of one of its
    turns, is not finite.
    """
    assert scores.is_floating_point() and scores.shape == response_mask.shape[:1], (
        f"{tuple(scores.shape)}"
    )
    mask = response_mask.bool()
    rows = mask.any(-1)
    finite = scores.isfinite()
    if turn_rewards is not None:
        turn_rewards = zero_outside(turn_rewards, mask)
        finite = finite & turn_rewards.isfinite().all(-1)
    bad = (rows & ~finite).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the scores of completions {bad} are not finite: rewards must be numbers")
    positions = torch.arange(mask.shape[1], device=mask.device)
    # [N] position of the last response token, also behind holes; -1 where the response is empty.
    last = by_rows(lambda part: torch.where(part, positions, -1).amax(-1), mask)
    rewards = scores.new_zeros(mask.shape)
    # `rows` leaves empty responses out, whose -1 would index the last column.
    rewards[rows, last[rows]] = scores[rows]
    return rewards if turn_rewards is None else rewards + turn_rewards


def apply_kl_penalty(
    token_rewards: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, coef: float, kind: str
) -> tuple[Tensor, float]:
    """(token rewards - coef x KL per token [N, R], mean KL, nats per token).

    The mean, which the adaptive controller follows, is over non-empty sequences of their token
    means, 0 without any. (verl's counts an empty sequence as one with KL 0.)
    """
    kl = kl_estimate(logp, ref_logp, kind, mask)
    # [N] token means, then their mean: a long response weighs no more than a short one.
    mean_kl = masked_mean(masked_mean(kl, mask, dim=-1), mask.bool().any(-1))
    return zero_outside(token_rewards - coef * kl, mask), float(mean_kl)


def overlong_penalty(
    lengths: Tensor, max_response_length: int, buffer_len: int, penalty_factor: float
) -> Tensor:
    """Soft penalty [N], 0 or negative, on responses that reach into the last `buffer_len` tokens.

    `lengths` [N] are those of the responses. min(0, (max_response_length - buffer_len - length) /
    buffer_len) * penalty_factor: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), which
    falls from 0 to -penalty_factor at max_response_length. ValueError unless 0 < buffer_len <=
    max_response_length.
    """
    if not 0 < buffer_len <= max_response_length:
        raise ValueError(
            f"reward.overlong_buffer.len={buffer_len} must be between 1 and "
            f"data.max_response_length={max_response_length}"
        )
    left = max_response_length - buffer_len - lengths.float()
    return (left / buffer_len * penalty_factor).clamp(max=0.0)
