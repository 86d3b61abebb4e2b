"""A trajectory is the same trajectory in one row or in several: rewards, advantages, corrections,
losses and gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experience import row
from support.rows import cut_rows, single_rows
from torch import Tensor

from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.algorithms.aggregation import AGGREGATION_MODES
from rlhf3d.algorithms.losses import POLICY_LOSSES, PolicyLossSettings
from rlhf3d.algorithms.objectives import Objective, PolicyObjective, ValueObjective
from rlhf3d.algorithms.trajectories import join_rows, row_places
from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.dispatch import for_update, split_update
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.schema import AlgorithmConfig, KLCtrlConfig, RolloutCorrectionConfig
from rlhf3d.engine.microbatch import make_microbatch
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.steps import untimed
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import written_by
from rlhf3d.trainer.correction import correct, mismatch, settings_of
from rlhf3d.trainer.learner import Learner
from rlhf3d.trainer.metrics import training_metrics

TRAJECTORIES, WIDTH = 6, 9
KL = KLCtrlConfig(type="adaptive", kl_coef=0.1, target_kl=0.05, horizon=100)
GAMMA, LAM = 0.9, 0.8
# At most three rows each.
CUTS = st.lists(
    st.lists(st.integers(1, WIDTH - 1), max_size=2), min_size=TRAJECTORIES, max_size=TRAJECTORIES
)
SEEDS = st.integers(0, 10**6)


def learner(estimator: str, **settings_: Any) -> Learner:
    config = AlgorithmConfig(adv_estimator=estimator, gamma=GAMMA, lam=LAM, **settings_)
    return Learner(config, {}, {}, {}, "phase", 0, lambda: None, untimed)


def by_trajectory(batch: Batch, name: str) -> Tensor:
    return join_rows(batch[name], row_places(batch.columns))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(ADVANTAGES.names())), SEEDS, CUTS)
def test_advantages_do_not_see_rows(estimator: str, seed: int, cuts: list[list[int]]) -> None:
    """KL in the reward, its controller and the metrics of the batch included."""
    whole = single_rows(seed, TRAJECTORIES, WIDTH, torch.float32)
    results = []
    for batch in (whole, cut_rows(whole, cuts)):
        trainer = learner(estimator, use_kl_in_reward=True, kl_ctrl=KL)
        batch, metrics = trainer.advantages(batch)
        columns = {
            name: by_trajectory(batch, name)
            for name in ("token_level_rewards", "advantages", "returns")
        }
        inside = by_trajectory(batch, "response_mask").bool()
        figures = training_metrics(batch, torch.ones_like(batch["response_mask"]).bool())
        results.append((columns, metrics | figures, trainer.state_dict(), inside))
    for name, column in results[0][0].items():
        assert torch.equal(column, results[1][0][name]), name
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, abs=1e-6)
    assert results[0][2] == results[1][2], "the controller counts trajectories"
    assert torch.equal(results[0][3], results[1][3])


@settings(deadline=None, max_examples=40)
@given(SEEDS, CUTS)
def test_gae_goes_on_across_turns_and_rows(seed: int, cuts: list[list[int]]) -> None:
    """Against GAE of nothing but the sampled tokens, one after the other."""
    whole = single_rows(seed, TRAJECTORIES, WIDTH, torch.float64)
    batch, _ = learner("gae").advantages(cut_rows(whole, cuts))
    returns = by_trajectory(batch, "returns")
    for number in range(TRAJECTORIES):
        inside = whole["response_mask"][number].bool()
        values = [*whole["values"][number][inside].tolist(), 0.0]
        rewards = whole["turn_rewards"][number][inside].tolist()
        if rewards:
            rewards[-1] += float(whole["rewards"][number])
        expected, advantage = [], 0.0
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + GAMMA * values[t + 1] - values[t]
            advantage = delta + GAMMA * LAM * advantage
            expected.append(advantage + values[t])
        assert returns[number][inside].tolist() == pytest.approx(expected[::-1], abs=1e-9)


def test_turn_rewards_sum_to_what_groups_are_compared_by() -> None:
    """Each on its turn's last token; the end's is what is left of the total."""
    first = Row(
        (4,),
        (Span("sampled", (8, 9), (-1.0, -1.0), written_by(1), 0.5), Span("environment", (20,))),
    )
    second = Row((4, 9), (Span("sampled", (10, 11), (-1.0, -1.0), written_by(1), 0.25),))
    talk = Trajectory(row(0).trajectory.prompt, 0, (first, second), "stop")
    scored = ScoredTrajectory(talk, "", Score(1.0, Outcome.SCORED), 1.75)
    experience = Experience([scored, row(0.5), row(2.0, 1)])
    batch, _ = learner("grpo").advantages(experience.batch(0))
    assert batch["token_level_rewards"].tolist() == [
        [0, 0.5, 0],
        [0, 1.25, 0],
        [0.5, 0, 0],
        [2.0, 0, 0],
    ]
    rewards = by_trajectory(batch, "token_level_rewards").sum(-1)
    assert torch.equal(rewards, experience.rewards)
    assert batch["advantages"][0, 0] == batch["advantages"][1, 1] > 0 > batch["advantages"][2, 0]
    assert batch["advantages"][0, 2] == 0, "the observation"
    assert batch["advantages"][3, 0] == 0, "alone in its group"
    batch = batch.with_columns(old_logprobs=batch["rollout_logprobs"])
    fresh = torch.ones_like(batch["response_mask"]).bool()
    assert training_metrics(batch, fresh)["critic/rewards/max"] == 2.0


def plan(rule: MicroBatching, trajectories: int = 4) -> UpdatePlan:
    return UpdatePlan(0, trajectories, rule, None, 1)


CORRECTIONS = [
    {"rollout_is": "token", "rollout_is_batch_normalize": True},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.2},
    {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.8_1.25"},
    {"rollout_rs": "seq_max_k2,seq_sum_k3", "rollout_rs_threshold": "0.2,0.5"},
]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(CORRECTIONS), SEEDS, CUTS)
def test_corrections_are_of_trajectories(
    asked: dict[str, Any], seed: int, cuts: list[list[int]]
) -> None:
    """Weights, rejected tokens and every figure, perplexities and χ² of sequences included."""
    whole = single_rows(seed, TRAJECTORIES, WIDTH, torch.float32)
    # Not all are rejected: the first keeps its ratio of 1.
    whole["old_logprobs"][0] = whole["rollout_logprobs"][0]
    corrected = []
    for batch in (whole, cut_rows(whole, cuts)):
        figures = mismatch(batch)
        batch, metrics = correct(
            batch,
            settings_of(RolloutCorrectionConfig(**asked)),
            plan(MicroBatching(1), TRAJECTORIES),
        )
        names = [n for n in ("rollout_is_weights", "response_mask") if n in batch]
        corrected.append((figures | metrics, {name: by_trajectory(batch, name) for name in names}))
    assert corrected[0][0] == corrected[1][0]
    for name, column in corrected[0][1].items():
        assert torch.equal(column, corrected[1][1][name])


def update(batch: Batch, rule: MicroBatching, objective: Objective, dp: int) -> Any:
    """Metrics of each mini-batch, and the gradient of a model whose outputs are one number a token,
    whatever row it is in.
    """
    batch = for_update(batch)
    layout, whole = ParallelLayout(dp=dp), objective.whole_trajectories
    shares = split_update(batch, plan(rule), layout, WIDTH, SequenceCost(0.01), whole)
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(TRAJECTORIES * WIDTH, generator=generator, dtype=torch.float64)
    theta = (0.3 * draws - 2).requires_grad_()
    entropy = torch.rand(theta.shape, generator=generator, dtype=torch.float64)
    metrics: list[dict[str, float]] = [{} for _ in shares[0].mini_batches]
    for share in shares:
        shard = batch.select(share.rows)
        for number, mini in enumerate(share.mini_batches):
            for rows in mini.micro_batches:
                micro = make_microbatch(shard, rows, Tensor.contiguous, rule).rows
                token = micro["token"]
                outputs = {"logprobs": theta[token], "values": theta[token]}
                outputs["entropy"] = entropy[token]
                loss, parts = objective(micro.columns, outputs, mini.norm)
                loss.backward()
                for name, value in parts.items():
                    metrics[number][name] = metrics[number].get(name, 0.0) + float(value)
    return metrics, theta.grad


RULES = [
    MicroBatching(3),
    MicroBatching(3, packed=True),
    MicroBatching(3, share_prefixes=True),
    MicroBatching(3, tokens=3 * 20, multiple_of=4),
    MicroBatching(3, tokens=3 * 20, packed=True, row_multiple_of=2, multiple_of=4),
]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*POLICY_LOSSES.names(), "value"]),
    st.sampled_from(AGGREGATION_MODES),
    st.sampled_from(RULES),
    st.integers(1, 3),
    SEEDS,
    CUTS,
)
def test_losses_and_gradients_do_not_see_rows(
    name: str, mode: str, rule: MicroBatching, dp: int, seed: int, cuts: list[list[int]]
) -> None:
    whole = single_rows(seed, TRAJECTORIES, WIDTH, torch.float64)
    whole["response_mask"][4, 0] = 1  # the second mini-batch has a token, too
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(whole["values"].shape, generator=generator, dtype=torch.float64)
    whole = whole.with_columns(
        advantages=draws, returns=draws, rollout_is_weights=0.5 + draws.abs()
    )
    objective: Objective = ValueObjective(0.2, mode)
    if name != "value":
        objective = PolicyObjective(name, PolicyLossSettings(), mode, 0.01, 0.1, "k3+")
    metrics, gradient = update(whole, MicroBatching(TRAJECTORIES), objective, 1)
    cut_metrics, cut_gradient = update(cut_rows(whole, cuts), rule, objective, dp)
    for ours, theirs in zip(cut_metrics, metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    assert torch.allclose(gradient, cut_gradient, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 0


def test_gspo_has_the_ratio_of_all_rows() -> None:
    """Two rows of one token each with ratios e and 1/e: their geometric mean is 1, not clipped."""
    whole = single_rows(0, 2, 2, torch.float64)
    ones = torch.ones(2, 2, dtype=torch.float64)
    whole = whole.with_columns(
        response_mask=ones,
        response_lengths=torch.tensor([2, 2]),
        advantages=ones,
        old_logprobs=-2 * ones,
    ).select([0])
    rows = for_update(cut_rows(whole, [[1]]))
    objective = PolicyObjective("gspo", PolicyLossSettings(), "seq-mean-token-mean")
    [share] = split_update(rows, plan(MicroBatching(2)), ParallelLayout(), 2, SequenceCost(), True)
    [mini] = share.mini_batches
    assert mini.norm.sequences == 1 and mini.micro_batches == [[0, 1]]
    logprobs = torch.tensor([[-1.0], [-3.0]], dtype=torch.float64, requires_grad=True)
    outputs = {"logprobs": logprobs, "entropy": torch.zeros_like(logprobs)}
    micro = make_microbatch(rows.select(share.rows), [0, 1], Tensor.contiguous, MicroBatching(2))
    loss, metrics = objective(micro.rows.columns, outputs, mini.norm)
    loss.backward()
    assert loss.item() == -1 and metrics["actor/pg_clipfrac"] == 0
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[-0.5], [-0.5]]
