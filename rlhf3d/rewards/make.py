"""From the reward sections of a configuration to what scores a run's completions.

Invariant: whatever cannot work (no scorer for a data source, a custom function that does not fit,
unknown parts) is a ValueError here, before anything is started.
"""

from __future__ import annotations

from collections.abc import Iterable

from rlhf3d.config.schema import CustomRewardConfig, RewardConfig, RewardModelConfig
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.parts import ENVIRONMENT_PART, EnvironmentPart, WeightedReward
from rlhf3d.rewards.reward_model import PART, ModelPart
from rlhf3d.rewards.scorers import BuiltinReward, check_data_sources


def make_reward(
    reward: RewardConfig, custom: CustomRewardConfig, data_sources: Iterable[str]
) -> RewardFunction | None:
    """The reward function of a run over these data sources.

    None: only a reward model or an environment rewards.
    """
    weights = _own_weights(reward)
    if not weights:
        return None
    sources = tuple(sorted(set(data_sources)))
    base: RewardFunction
    if custom.path is not None:
        base = load_custom_reward(custom.path, custom.name, custom.kwargs)
    else:
        # Only here: a user's function scores whatever data sources it likes.
        check_data_sources(sources, reward.scorers)
        base = BuiltinReward(reward.method, sources, dict(reward.scorers))
    if weights == {"accuracy": 1.0}:
        return base
    return WeightedReward(base, weights, reward.format)


def needs_rule(reward: RewardConfig, custom: CustomRewardConfig) -> bool:
    """Whether a built-in scorer scores completions."""
    return custom.path is None and bool(_own_weights(reward))


def _own_weights(reward: RewardConfig) -> dict[str, float]:
    """Of the parts that scoring processes return.

    The reward model's part is added by the manager, and the environment's by the collector.
    """
    others = (PART, ENVIRONMENT_PART)
    return {name: weight for name, weight in reward.weights.items() if name not in others}


def environment_part(reward: RewardConfig) -> EnvironmentPart | None:
    """How an environment's rewards enter the reward; None: they do not."""
    weight = reward.weights.get(ENVIRONMENT_PART)
    if weight is None:
        return None
    return EnvironmentPart(weight, alone=set(reward.weights) == {ENVIRONMENT_PART})


def model_part(reward: RewardConfig, model: RewardModelConfig) -> ModelPart:
    """How a reward model's scores enter the reward."""
    return ModelPart(reward.weights[PART], model.mean, model.std)
