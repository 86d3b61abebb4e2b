"""What a micro-batch contributes to the actor's and the critic's loss.

Invariant: normalizers are the global mini-batch's (`LossNorm`), so the contributions of any split
into micro-batches and data-parallel ranks add up to the same loss and gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from rlhf3d.algorithms.aggregation import LossNorm, aggregate
from rlhf3d.algorithms.kl import kl_estimate
from rlhf3d.algorithms.losses import (
    POLICY_LOSSES,
    PolicyLossSettings,
    compute_policy_loss,
    value_loss,
)
from rlhf3d.algorithms.trajectories import row_places


@dataclass(frozen=True)
class PolicyObjective:
    """Policy loss - entropy bonus + KL to the reference."""

    loss_name: str
    settings: PolicyLossSettings
    loss_agg_mode: str
    entropy_coeff: float = 0.0
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "low_var_kl"
    old_is_current: bool = False
    """The old policy is the current one: its log-probs are the outputs' own, held constant. True
    for the only optimizer step of a batch, whose rows then need no `old_logprobs`."""

    @property
    def whole_trajectories(self) -> bool:
        """Whether the rows of a trajectory must be in one micro-batch, in their order."""
        return POLICY_LOSSES[self.loss_name].whole_trajectories

    def __call__(
        self, rows: Mapping[str, Tensor], outputs: Mapping[str, Tensor], norm: LossNorm
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss share (a scalar with gradient) and metric shares.

        `outputs` are logprobs and entropy [b, r]. The rows' `rollout_is_weights`, where they have
        any, multiply the policy loss alone.
        """
        mask, logprobs, entropy = rows["response_mask"], outputs["logprobs"], outputs["entropy"]
        old_logprobs = logprobs.detach() if self.old_is_current else rows["old_logprobs"]
        weigh = partial(aggregate, trajectory_tokens=rows.get("trajectory_tokens"))
        terms = compute_policy_loss(
            self.loss_name,
            logprobs,
            old_logprobs,
            rows["advantages"],
            mask,
            self.settings,
            rows.get("rollout_is_weights"),
            row_places(rows) if self.whole_trajectories else None,
        )
        loss = pg_loss = weigh(terms.loss, mask, self.loss_agg_mode, norm)
        mean = {
            name: aggregate(value, mask, "token-mean", norm)
            for name, value in terms.metrics.items()
        }
        mean["pg_loss"] = pg_loss
        # Reported as a token mean, whatever loss_agg_mode weighs it by in the loss.
        mean["entropy"] = aggregate(entropy, mask, "token-mean", norm)
        if self.entropy_coeff:
            loss = loss - self.entropy_coeff * weigh(entropy, mask, self.loss_agg_mode, norm)
        # A reference model exists, and with it `ref_logprobs`, only where a KL term uses it.
        if self.kl_loss_coef:
            kl = kl_estimate(logprobs, rows["ref_logprobs"], self.kl_loss_type, mask)
            kl_loss = weigh(kl, mask, self.loss_agg_mode, norm)
            loss = loss + self.kl_loss_coef * kl_loss
            mean["kl_loss"] = kl_loss
        return loss, {
            f"actor/{name}": value.detach() for name, value in {**mean, "loss": loss}.items()
        }


@dataclass(frozen=True)
class ValueObjective:
    """Clipped squared error to the returns."""

    cliprange_value: float
    loss_agg_mode: str
    whole_trajectories: ClassVar[bool] = False
    """See `PolicyObjective`: each token's loss is its own."""
    old_is_current: ClassVar[bool] = False
    """Values before the update are columns of the batch."""

    def __call__(
        self, rows: Mapping[str, Tensor], outputs: Mapping[str, Tensor], norm: LossNorm
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss share (a scalar with gradient) and metric shares.

        `outputs` are values [b, r].
        """
        mask, values = rows["response_mask"], outputs["values"]
        # rows["values"] are the critic's before this step's updates, `values` its current ones.
        per_token, clipped = value_loss(
            values, rows["values"], rows["returns"], mask, self.cliprange_value
        )
        tokens = rows.get("trajectory_tokens")
        loss = aggregate(per_token, mask, self.loss_agg_mode, norm, tokens)
        mean = {
            "vf_loss": loss,
            "vf_clipfrac": aggregate(clipped, mask, "token-mean", norm),
            "vpred_mean": aggregate(values, mask, "token-mean", norm),
        }
        return loss, {f"critic/{name}": value.detach() for name, value in mean.items()}


Objective = PolicyObjective | ValueObjective
"""What an update minimizes: called with the rows' columns, the model's outputs and the counts."""
