"""KL divergence to the reference: per-token estimators and the controllers of its coefficient.

Invariant: an estimate depends on the two log-probabilities of the sampled token only; a
controller's coefficient changes only in `update`, called after the coefficient was used.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor

from rlhf3d.algorithms.masked import zero_outside
from rlhf3d.algorithms.names import KL_KINDS
from rlhf3d.algorithms.registry import unknown_name

# exp(20) is about 5e8: far beyond any clip range, and finite in float32 when it is squared.
LOG_RATIO_CLAMP = 20.0
K3_CLAMP = 10.0


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """Estimate KL(policy, reference), nats, from log-probabilities of tokens the policy sampled.

    With l = logp - ref_logp: k1 (kl) is l, abs |l|, k2 (mse) l²/2, k3 (low_var_kl) exp(-l) - 1 + l
    with l clamped to ±20 and the estimate to ±10 (http://joschu.net/blog/kl-approx.html; clamps as
    in verl). A clamped token passes no gradient. A `+` behind the name (straight-through) keeps the
    estimator's value and takes k2's gradient l, which is in expectation the gradient of the KL
    itself; that of k1 is 0 and that of k3 belongs to the reverse divergence. With `mask` the
    estimate is 0 outside it. ValueError for another kind.
    """
    if kind not in KL_KINDS:
        raise unknown_name(
            "KL estimator (algorithm.kl_penalty, actor.kl_loss_type)", kind, KL_KINDS
        )
    log_ratio = logp - ref_logp
    # Before the estimate: a gradient of 0 that flows back through a NaN or infinity is NaN.
    if mask is not None:
        log_ratio = zero_outside(log_ratio, mask)
    estimate = _estimate(log_ratio, kind.removesuffix("+"))
    if not kind.endswith("+"):
        return estimate
    k2 = 0.5 * log_ratio.square()
    # k2 - k2 is 0, so the value is the estimate's; the gradient is that of k2.
    return estimate.detach() + (k2 - k2.detach())


def _estimate(log_ratio: Tensor, kind: str) -> Tensor:
    if kind in ("k1", "kl"):
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind in ("k2", "mse"):
        return 0.5 * log_ratio.square()
    # k3. With x = -l: exp(x) - 1 - x; expm1 keeps the digits that exp(x) - 1 loses near 0.
    negative = (-log_ratio).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return (negative.expm1() - negative).clamp(-K3_CLAMP, K3_CLAMP)


class KLController(Protocol):
    """The KL coefficient `value` and how it follows the measured KL."""

    value: float

    def update(self, current_kl: float, n_steps: int) -> None:
        """Take in the mean KL (nats per token) of a step of `n_steps` sequences."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; ValueError when it is of another controller type."""


class FixedKLController:
    """A constant coefficient: configuration, so a checkpoint keeps nothing of it."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Leave the coefficient as it is."""

    def state_dict(self) -> dict[str, Any]:
        return {"type": "fixed"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_type(state, "fixed")


class AdaptiveKLController:
    """The adaptive controller of Ziegler et al. (arXiv 1909.08593).

    value *= 1 + clip(kl / target - 1, ±0.2) * n_steps / horizon.
    """

    def __init__(self, kl_coef: float, target_kl: float, horizon: int) -> None:
        if target_kl <= 0 or horizon <= 0:
            raise ValueError(
                f"algorithm.kl_ctrl: target_kl={target_kl} and horizon={horizon} must both be "
                "positive"
            )
        self.value = kl_coef
        self.target_kl = target_kl
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the coefficient.

        ValueError when the KL is not finite or `value` could become negative.
        """
        if not math.isfinite(current_kl):
            raise ValueError(
                f"the measured KL is {current_kl}: the policy's log-probabilities are broken"
            )
        # The factor below can be as low as 1 - 0.2 n_steps / horizon, which must stay above 0.
        if 0.2 * n_steps >= self.horizon:
            raise ValueError(
                f"algorithm.kl_ctrl.horizon={self.horizon} is too short for steps of {n_steps} "
                f"sequences: set it above {n_steps // 5}"
            )
        error = min(max(current_kl / self.target_kl - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"type": "adaptive", "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_type(state, "adaptive")
        self.value = float(state["value"])


def make_kl_controller(type: str, kl_coef: float, target_kl: float, horizon: int) -> KLController:
    """The controller of `algorithm.kl_ctrl`, `horizon` in sequences.

    ValueError for another type.
    """
    if type == "fixed":
        return FixedKLController(kl_coef)
    if type == "adaptive":
        return AdaptiveKLController(kl_coef, target_kl, horizon)
    raise unknown_name("algorithm.kl_ctrl.type", type, ("fixed", "adaptive"))


def _check_type(state: dict[str, Any], expected: str) -> None:
    if state.get("type") != expected:
        raise ValueError(
            f"algorithm.kl_ctrl.type={expected}, but the checkpoint holds {state.get('type')!r}: "
            "resume with that type or start a new run"
        )
