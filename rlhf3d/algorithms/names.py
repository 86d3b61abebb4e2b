"""The names by which a configuration chooses among algorithms, and what an estimator needs.

Invariant: each name stands here once. The registries (`advantages`, `losses`) attach a function to
every name, and the configuration reads its choices from here; so nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EstimatorNeeds:
    """What an advantage estimator cannot do without, besides rewards."""

    values: bool = False
    """A critic."""
    groups: bool = False
    """Several completions of each prompt (rollout.n above 1)."""
    greedy_baseline: bool = False
    """The score of one greedy completion of each prompt."""


ADVANTAGE_ESTIMATORS: dict[str, EstimatorNeeds] = {
    "gae": EstimatorNeeds(values=True),
    "grpo": EstimatorNeeds(groups=True),
    "rloo": EstimatorNeeds(groups=True),
    "reinforce_plus_plus": EstimatorNeeds(),
    "reinforce_plus_plus_baseline": EstimatorNeeds(groups=True),
    "remax": EstimatorNeeds(greedy_baseline=True),
    "opo": EstimatorNeeds(groups=True),
}
"""algorithm.adv_estimator; a user's file adds its own."""

POLICY_LOSSES = ("vanilla", "gspo", "cispo", "pg")
"""actor.policy_loss; a user's file adds its own."""

_KL_ESTIMATORS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl")
KL_KINDS = (*_KL_ESTIMATORS, *(f"{name}+" for name in _KL_ESTIMATORS))
"""Estimators of the KL; `kl`, `mse` and `low_var_kl` are verl's other names of k1, k2 and k3."""

AGGREGATION_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
"""actor.loss_agg_mode and critic.loss_agg_mode."""

IS_LEVELS = ("token", "sequence")
"""algorithm.rollout_correction.rollout_is."""

RS_KINDS = (
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
)
"""algorithm.rollout_correction.rollout_rs, one or several."""
