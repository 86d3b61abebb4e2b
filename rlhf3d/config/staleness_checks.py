"""What asynchronous training asks of the other keys: refusals of `rollout.max_staleness > 0`.

Invariant: as in `checks.py`, each problem names key, value and fix. What is not refused here works
in every mode.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.schema import RolloutConfig, RolloutCorrectionConfig

_CORRECTION = "algorithm.rollout_correction"


def check_staleness(
    rollout: RolloutConfig,
    correction: RolloutCorrectionConfig,
    policy_loss: str,
    environment: EnvironmentConfig,
) -> Iterator[str]:
    """Problems of `rollout.max_staleness` and `rollout.update` with the rest."""
    if rollout.max_staleness > 0:
        yield from _check_old_policy(rollout, correction)
        yield from _check_ratio(rollout, correction, policy_loss)
        if rollout.sleep:
            yield (
                f"rollout.sleep = true with rollout.max_staleness = {rollout.max_staleness}: "
                "engines generate while training ranks compute, so they cannot give their memory "
                "up; set rollout.sleep=false, or rollout.max_staleness=0"
            )
    if rollout.update == "in_flight":
        yield from _check_in_flight(rollout, environment)


def _check_old_policy(rollout: RolloutConfig, correction: RolloutCorrectionConfig) -> Iterator[str]:
    """PPO's ratio is against the policy that sampled: which log-probs stand for it."""
    if (
        correction.bypass_mode
        or correction.rollout_is is not None
        or correction.rollout_rs is not None
    ):
        return
    # The clip has nothing to bound where the old log-probs are the trained weights' own: their
    # ratio is 1 at the first mini-batch, however old the tokens are.
    yield (
        f"rollout.max_staleness = {rollout.max_staleness}: which policy do tokens of older weights "
        "come from? Log-probs recomputed under the newest weights switch clipping off, so choose\n"
        f"{_CORRECTION}.bypass_mode=true: the engine's log-probs are the old ones, and clipping is "
        "against the policy that sampled; or\n"
        f"{_CORRECTION}.rollout_is=token (or sequence, or rollout_rs): the old ones are recomputed "
        "under the weights before the update, and weights correct for the policy that sampled"
    )


def _check_ratio(
    rollout: RolloutConfig, correction: RolloutCorrectionConfig, policy_loss: str
) -> Iterator[str]:
    """In bypass mode the loss's own ratio is the correction: it must have one."""
    if policy_loss == "pg" and correction.bypass_mode:
        yield (
            f"actor.policy_loss = pg with rollout.max_staleness = {rollout.max_staleness}: "
            "its loss has no ratio, so in bypass mode nothing corrects for older weights; set "
            f"actor.policy_loss=vanilla (or cispo), or {_CORRECTION}.bypass_mode=false with "
            "rollout_is=token"
        )


def _check_in_flight(rollout: RolloutConfig, environment: EnvironmentConfig) -> Iterator[str]:
    name = f"rollout.update = {rollout.update}"
    if rollout.max_staleness == 0:
        yield (
            f"{name} with rollout.max_staleness = 0: nothing runs while weights come; set "
            "rollout.max_staleness=1 or more, or rollout.update=between_batches"
        )
    if rollout.placement != "disaggregated":
        yield (
            f"{name} with rollout.placement = {rollout.placement}: requests go on while training "
            "ranks compute and send, which takes devices of their own; set "
            "rollout.placement=disaggregated, or rollout.update=between_batches"
        )
    if environment.enabled and environment.rounds:
        yield (
            f"environment.rounds = true with {name}: trajectories come and go one by one, so that "
            "there are no rounds; set environment.rounds=false (`rlhf3d replay` repeats the run), "
            "or rollout.update=between_batches"
        )
