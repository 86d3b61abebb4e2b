"""From token rewards to advantages and returns: a registry of estimators.

Invariant: only response tokens count. Rewards and values outside the mask are never read, outputs
are 0 there, and an empty response takes no part in its group's statistics.

Shapes: N trajectories of a step, R response tokens; a trajectory of several rows of the batch is
one row here (`trajectories.join_rows`). A user's own estimator:

    @register_advantage("mine")
    def mine(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf3d.algorithms.groups import group_sum
from rlhf3d.algorithms.masked import by_rows, masked_whiten, zero_outside
from rlhf3d.algorithms.names import ADVANTAGE_ESTIMATORS, EstimatorNeeds
from rlhf3d.algorithms.registry import Registry


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may use; rows are complete trajectories, in any order."""

    token_level_rewards: Tensor
    """[N, R] reward of each token: a turn's on its last, the end's on the last, KL penalty
    included."""
    response_mask: Tensor
    """[N, R] 1 for tokens the policy wrote; holes are what the chat template and the environment
    wrote between turns."""
    group_ids: Tensor
    """[N] integers, equal for completions of the same prompt."""
    turn_rewards: Tensor | None = None
    """[N, R] that part of `token_level_rewards` that environments gave for turns; null where they
    gave none."""
    values: Tensor | None = None
    """[N, R] the critic's value before each token."""
    greedy_scores: Tensor | None = None
    """[N] score of the greedy completion of each row's prompt."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 1.0
    """GAE lambda."""
    norm_by_std: bool = True
    """GRPO divides by the group's standard deviation (False: Dr.GRPO)."""
    custom: Mapping[str, Any] = field(default_factory=dict)
    """algorithm.custom_kwargs, for a user's own estimator."""


Estimator = Callable[[AdvantageInputs], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AdvantageSpec:
    """A registered estimator and the inputs it cannot do without."""

    fn: Estimator
    needs: EstimatorNeeds


ADVANTAGES: Registry[AdvantageSpec] = Registry("algorithm.adv_estimator")


def register_advantage(
    name: str,
    *,
    needs_values: bool = False,
    needs_groups: bool = False,
    needs_greedy_baseline: bool = False,
) -> Callable[[Estimator], Estimator]:
    """Decorator: make a function of a user's file available as `algorithm.adv_estimator=name`."""
    return _register(name, EstimatorNeeds(needs_values, needs_groups, needs_greedy_baseline))


def _built_in(name: str) -> Callable[[Estimator], Estimator]:
    """Decorator for the estimators of this file, whose names and needs are in `names`."""
    return _register(name, ADVANTAGE_ESTIMATORS[name])


def _register(name: str, needs: EstimatorNeeds) -> Callable[[Estimator], Estimator]:
    def add(fn: Estimator) -> Estimator:
        ADVANTAGES.add(name, AdvantageSpec(fn, needs))
        return fn

    return add


def needs_greedy_baseline(name: str) -> bool:
    """Whether estimator `name` needs one greedy completion per prompt.

    ValueError for an unknown name.
    """
    return ADVANTAGES[name].needs.greedy_baseline


def compute_advantages(name: str, inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [N, R] and 0 outside the mask, by estimator `name`.

    ValueError for an unknown name, or when values or greedy scores it needs are missing.
    """
    spec = ADVANTAGES[name]
    mask, values = inputs.response_mask, inputs.values
    assert inputs.group_ids.shape == mask.shape[:1], f"group_ids {tuple(inputs.group_ids.shape)}"
    if spec.needs.values and values is None:
        raise ValueError(f"algorithm.adv_estimator={name} needs values: place a critic")
    if spec.needs.greedy_baseline and inputs.greedy_scores is None:
        raise ValueError(f"algorithm.adv_estimator={name} needs the scores of greedy completions")
    # Zeroed once here, so that estimators, a user's too, may sum over complete rows.
    clean = replace(
        inputs,
        token_level_rewards=zero_outside(inputs.token_level_rewards, mask),
        turn_rewards=_inside(inputs.turn_rewards, mask),
        values=_inside(values, mask),
    )
    advantages, returns = spec.fn(clean)
    # An estimator may fill complete rows, as with `expand_as`; both may be one tensor.
    inside = zero_outside(advantages, mask)
    return inside, inside if returns is advantages else zero_outside(returns, mask)


def _inside(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else zero_outside(values, mask)


@_built_in("gae")
def gae(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438).

    δ_t = r_t + γV_{t+1} - V_t, A_t = δ_t + γλA_{t+1}. Masked tokens are skipped: "t+1" is the next
    token that the policy wrote, in the next turn too. Returns are A + V before A is whitened.
    """
    rewards, values, mask = inputs.token_level_rewards, inputs.values, inputs.response_mask.bool()
    assert values is not None
    # [N]. Nothing follows the last response token, also where the length limit cut it off.
    next_value = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + inputs.gamma * next_value - values[:, t]
        # Where token t is masked, the state of the next response token passes through unchanged.
        running = torch.where(mask[:, t], delta + inputs.gamma * inputs.lam * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(running)
    advantages = torch.stack(columns[::-1], dim=1)
    # The critic predicts unwhitened rewards, so its targets are on their scale.
    return masked_whiten(advantages, mask), advantages + values


@_built_in("grpo")
def grpo(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """(s - mean) / (std + 1e-6) within the group (arXiv 2402.03300), std with ddof 1.

    A lone response has nothing to be compared with and gets 0 (verl's keeps its score).
    Without `norm_by_std`: s - mean, Dr.GRPO (arXiv 2503.20783).
    """
    scores, counted = _outcomes(inputs)
    centered, size = _centered(scores, counted, inputs.group_ids)
    if inputs.norm_by_std:
        # `counted`: an empty response's score is 0, but its distance from the mean is not.
        variance = group_sum(counted * centered.square(), inputs.group_ids) / (size - 1).clamp(
            min=1
        )
        # A lone response has no deviation; its centered score is 0 whatever divides it.
        centered = centered / (torch.where(size > 1, variance.sqrt(), 1.0) + 1e-6)
    return _on_every_token(centered, inputs)


@_built_in("rloo")
def rloo(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Score minus the mean of the group's other scores (arXiv 2402.14740); a lone one gets 0."""
    scores, counted = _outcomes(inputs)
    centered, size = _centered(scores, counted, inputs.group_ids)
    # n / (n - 1) times (s - mean of all n) is s - mean of the other n - 1.
    return _on_every_token(
        centered * torch.where(size > 1, size / (size - 1).clamp(min=1), 1.0), inputs
    )


@_built_in("reinforce_plus_plus")
def reinforce_plus_plus(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Discounted reward-to-go, whitened over the batch (arXiv 2501.03262).

    Masked tokens are skipped.
    """
    rewards, mask = inputs.token_level_rewards, inputs.response_mask.bool()
    running = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + inputs.gamma * running, running)
        columns.append(running)
    returns = torch.stack(columns[::-1], dim=1)
    return masked_whiten(returns, mask), returns


@_built_in("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Score minus its group's mean, on every token, whitened (arXiv 2501.03262)."""
    scores, counted = _outcomes(inputs)
    centered, _ = _centered(scores, counted, inputs.group_ids)
    advantages = masked_whiten(_on_every_token(centered, inputs)[0], inputs.response_mask)
    return advantages, advantages


@_built_in("remax")
def remax(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Undiscounted reward-to-go minus the prompt's greedy score (arXiv 2310.10505).

    Where turns are rewarded, what earlier turns earned counts too.
    """
    assert inputs.greedy_scores is not None
    # Sum over t and all later tokens: rewards are 0 outside the mask, so holes need no care.
    returns = inputs.token_level_rewards.flip(-1).cumsum(-1).flip(-1)
    if inputs.turn_rewards is not None:
        # The greedy score is of a complete trajectory: what is left alone would fall short of it.
        returns = returns + inputs.turn_rewards.cumsum(-1) - inputs.turn_rewards
    # The baseline does not depend on the sampled tokens, so it adds no bias to the gradient.
    return returns - inputs.greedy_scores.to(returns.dtype)[:, None], returns


@_built_in("opo")
def opo(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Score minus the length-weighted mean score of the group (arXiv 2505.23585).

    A lone response gets 0.
    """
    scores, counted = _outcomes(inputs)
    lengths = inputs.response_mask.bool().sum(-1).double()
    weighted = group_sum(scores * lengths, inputs.group_ids)
    # Empty responses have length 0 and so no weight; the clamp is for a group of them alone.
    baseline = weighted / group_sum(lengths, inputs.group_ids).clamp(min=1)
    size = group_sum(counted, inputs.group_ids)
    # A lone score minus its own weighted mean is 0 except for rounding.
    return _on_every_token(torch.where(size > 1, scores - baseline, 0.0), inputs)


def _outcomes(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Scores [N], and 1 for each non-empty response [N].

    In float64, so that equal scores center to exactly 0.
    """
    counted = inputs.response_mask.bool().any(-1).double()
    return by_rows(lambda part: part.double().sum(-1), inputs.token_level_rewards), counted


def _centered(scores: Tensor, counted: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Score minus group mean [N], and group size [N].

    Only non-empty responses count. A group of one gets exactly 0.
    """
    size = group_sum(counted, group_ids)
    # Empty responses add nothing to the sum: without a token, their score is 0.
    return scores - group_sum(scores, group_ids) / size.clamp(min=1), size


def _on_every_token(advantage: Tensor, inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """One number per sequence [N] on each of its tokens, as advantages and as returns [N, R]."""
    rewards = inputs.token_level_rewards
    tokens = advantage.to(rewards.dtype)[:, None].expand_as(rewards)
    return tokens, tokens  # `compute_advantages` leaves 0 outside the mask
