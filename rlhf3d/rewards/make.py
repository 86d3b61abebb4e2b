"""From the reward sections of a configuration to what scores a run's completions.

Invariant: whatever cannot work (no scorer for a data source, a custom function that does not fit,
unknown parts) is a ValueError here, before anything is started.
"""

from __future__ import annotations

from collections.abc import Iterable

from rlhf3d.config.schema import CustomRewardConfig, RewardConfig, RewardModelConfig
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.parts import WeightedReward
from rlhf3d.rewards.reward_model import PART, ModelPart
from rlhf3d.rewards.scorers import BuiltinReward, check_data_sources


def make_reward(
    reward: RewardConfig, custom: CustomRewardConfig, data_sources: Iterable[str]
) -> RewardFunction | None:
    """The reward function of a run over these data sources; None: only a reward model scores."""
    # The manager adds the reward model's part to what the scoring processes return.
    weights = {name: weight for name, weight in reward.weights.items() if name != PART}
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


def model_part(reward: RewardConfig, model: RewardModelConfig) -> ModelPart:
    """How a reward model's scores enter the reward."""
    return ModelPart(reward.weights[PART], model.mean, model.std)
