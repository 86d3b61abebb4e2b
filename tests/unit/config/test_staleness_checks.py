"""What asynchronous training works with, and what has to be stated for it."""

from __future__ import annotations

import pytest
from support.checking import BYPASS, IN_FLIGHT, make, says

from rlhf3d.config.checks import check
from rlhf3d.config.load import ConfigError


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # asynchronous training
        (
            ["rollout.max_staleness=1"],
            "rollout.max_staleness = 1 … bypass_mode=true … rollout_is=token",
        ),
        (
            ["rollout.max_staleness=1", BYPASS, "rollout.sleep=true"],
            "rollout.sleep = true … rollout.max_staleness = 1 … rollout.sleep=false",
        ),
        (
            ["rollout.max_staleness=1", BYPASS, "actor.policy_loss=pg"],
            "actor.policy_loss = pg … rollout.max_staleness = 1 … policy_loss=vanilla",
        ),
        (
            ["rollout={update: in_flight, placement: disaggregated}"],
            "rollout.update = in_flight … rollout.max_staleness = 0 … rollout.max_staleness=1",
        ),
        (
            ["rollout={update: in_flight, max_staleness: 1}", BYPASS],
            "rollout.update = in_flight … rollout.placement = colocated … disaggregated",
        ),
        (
            [IN_FLIGHT, BYPASS, "environment={path: e.py, rounds: true}"],
            "environment.rounds = true … rollout.update = in_flight … environment.rounds=false",
        ),
    ],
)
def test_refusals(overrides: list[str], expected: str) -> None:
    (problem,) = check(make(*overrides))
    assert says(problem, expected), problem


CORRECTION = "algorithm.rollout_correction"


@pytest.mark.parametrize(
    "stated",
    [
        BYPASS,
        f"{CORRECTION}.rollout_is=sequence",
        f"{CORRECTION}={{rollout_rs: token_k1, rollout_rs_threshold: 2.0}}",
    ],
)
def test_staleness_with_a_stated_old_policy(stated: str) -> None:
    assert check(make("rollout.max_staleness=2", stated)) == []
    assert check(make(IN_FLIGHT, stated)) == []


def test_what_asynchronous_training_works_with() -> None:
    for mode in ("rollout.max_staleness=1", IN_FLIGHT):
        for overrides in (
            ["algorithm={adv_estimator: grpo, filter_groups: {enable: true}}", "rollout.n=2"],
            ["algorithm.adv_estimator=remax"],
            ["environment.path=e.py"],
            ["reward_model.path=r", "reward.weights={reward_model: 1.0}"],
            ["actor.ppo_mini_batch_size=8", "actor.ppo_epochs=2"],
            ["trainer.critic_warmup=2"],
        ):
            assert check(make(mode, BYPASS, *overrides)) == []


def test_both_ways_to_state_the_old_policy_have_a_line() -> None:
    (problem,) = check(make("rollout.max_staleness=1"))
    why, engines, recomputed = problem.splitlines()
    assert "clipping off" in why
    assert "bypass_mode=true" in engines
    assert "rollout_is=token" in recomputed
    assert f"\n    {engines}\n    {recomputed}" in str(ConfigError([problem]))
