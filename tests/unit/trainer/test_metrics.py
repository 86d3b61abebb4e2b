"""Figures of a step, by hand."""

from __future__ import annotations

import pytest
import torch
from support.experience import in_groups, row

from rlhf3d.batching.batch import from_sequences
from rlhf3d.experience.scored import Experience
from rlhf3d.rewards.score import SCORING, Outcome, Score
from rlhf3d.trainer.metrics import (
    length_metrics,
    rollout_metrics,
    score_metrics,
    throughput_metrics,
    training_metrics,
)


def test_score_metrics_count_outcomes_and_mixed_groups() -> None:
    scores = [
        Score(1.0, Outcome.SCORED),
        Score(0.0, Outcome.SCORED),
        Score(0.0, Outcome.UNPARSABLE),
        Score(0.0, Outcome.ERROR),
    ]
    metrics = score_metrics(in_groups(scores, 2))
    assert metrics["critic/score/mean"] == 0.25
    assert metrics["reward/mixed_groups_share"] == 0.5
    counts = {outcome: metrics[f"reward/outcome/{outcome.value}"] for outcome in SCORING}
    assert counts == {
        Outcome.SCORED: 2,
        Outcome.UNPARSABLE: 1,
        Outcome.ERROR: 1,
        Outcome.TIMEOUT: 0,
    }


def test_empty_responses_are_in_no_mean_of_scores() -> None:
    """Scores 1, 0 and, of nothing, 1: verl's mean leaves the last one out."""
    rows = [row(1.0, 0), row(0.0, 1), row(1.0, 2, tokens=())]
    metrics = score_metrics(Experience(rows))
    assert metrics["critic/score/mean"] == 0.5
    assert "reward/mixed_groups_share" not in metrics, "groups of one"


def test_what_a_reward_model_said_is_reported() -> None:
    """Scores before normalization and weight, of the completions it was asked about."""
    scores = [
        Score(9.0, Outcome.SCORED, {"reward_model": 1.0, "reward_model_cut": True}),
        Score(9.0, Outcome.SCORED, {"reward_model": -3.0, "reward_model_cut": False}),
        Score(0.0, Outcome.ERROR),
        Score(9.0, Outcome.SCORED, {"reward_model": 5.0, "reward_model_cut": True}),
    ]
    metrics = {
        name: value
        for name, value in score_metrics(in_groups(scores, 1)).items()
        if name.startswith("reward_model")
    }
    assert metrics == {
        "reward_model/score/mean": 1.0,
        "reward_model/score/max": 5.0,
        "reward_model/score/min": -3.0,
        "reward_model/score/std": pytest.approx((32 / 3) ** 0.5),
        "reward_model/truncated": 2.0,
    }


def test_length_metrics() -> None:
    """Of 4, 4, 0 and 0 tokens the second was cut off; the first ended with its fourth token."""
    rows = [
        row(0, tokens=range(4), prompt_length=3),
        row(0, tokens=range(4), prompt_length=5, finish="length"),
        row(0, tokens=(), prompt_length=4),
        row(0, tokens=(), prompt_length=6),
    ]
    metrics = length_metrics(Experience(rows), max_response_length=4)
    assert metrics["response_length/mean"] == 2 and metrics["response_length/max"] == 4
    assert metrics["response_length/clip_ratio"] == 0.5
    assert metrics["response/truncated_ratio"] == 0.25
    assert metrics["response/aborted_ratio"] == 0.5
    assert metrics["prompt_length/mean"] == 4.5 and metrics["prompt_length/max"] == 6
    assert metrics["perf/total_num_tokens"] == 26 and metrics["perf/response_tokens"] == 8


def test_overlong_penalty_and_greedy_baseline_are_reported() -> None:
    """Rewards 1 and 0 of scores 1 and ½: one of two was cut by ½."""
    rows = [row(1.0, greedy_reward=0.25), row(0.5, reward=0.0, greedy_reward=0.75)]
    metrics = rollout_metrics(Experience(rows), overlong=True, max_response_length=4)
    assert metrics["reward/overlong_penalty/mean"] == -0.25
    assert metrics["reward/overlong_share"] == 0.5
    assert metrics["critic/score/mean"] == 0.5 and metrics["reward/greedy_baseline/mean"] == 0.5
    without = rollout_metrics(in_groups([1.0], 1), overlong=False, max_response_length=4)
    assert "reward/overlong_share" not in without and "reward/greedy_baseline/mean" not in without


def test_training_metrics_ignore_padding() -> None:
    batch = from_sequences([[1]] * 2, [[5, 6], [7]], 0, rollout_logprobs=[[-1.0, -2.0], [-3.0]])
    poison = torch.tensor([[0.0, 0.0], [0.0, 99.0]])
    rows = batch.with_columns(
        old_logprobs=torch.tensor([[-1.0, -2.5], [-3.0, 0.0]]) + poison,
        token_level_rewards=torch.tensor([[0.0, 1.0], [0.5, 0.0]]),
        advantages=torch.tensor([[1.0, 2.0], [3.0, 0.0]]) + poison,
        returns=torch.tensor([[1.0, 1.0], [0.5, 0.0]]) + poison,
        values=torch.tensor([[1.0, 1.0], [0.5, 0.0]]) + poison,
    )
    every = torch.ones(2, 2, dtype=torch.bool)
    metrics = training_metrics(rows, every)
    assert metrics["critic/advantages/mean"] == 2 and metrics["critic/advantages/max"] == 3
    assert metrics["critic/rewards/mean"] == 0.75
    assert metrics["critic/vf_explained_var"] == 1
    assert metrics["training/rollout_logprobs_diff_max"] == pytest.approx(0.5)
    assert not any(name.startswith("training/off_policy") for name in metrics)
    two_policies = rows.with_columns(old_logprobs=rows["rollout_logprobs"])
    assert not any(name.startswith("training/") for name in training_metrics(two_policies, every))


def test_a_difference_of_old_tokens_is_none_of_engines() -> None:
    """Engine and trainer agree to 0.1 on their common version; training has moved the rest by 2."""
    batch = from_sequences([[1]] * 2, [[5, 6], [7]], 0, rollout_logprobs=[[-1.0, -3.0], [-3.0]])
    zero = torch.zeros(2, 2)
    rows = batch.with_columns(
        old_logprobs=torch.tensor([[-1.1, -1.0], [-1.0, 0.0]]),
        token_level_rewards=zero,
        advantages=zero,
        returns=zero,
    )
    fresh = torch.tensor([[True, False], [False, False]])
    metrics = training_metrics(rows, fresh)
    assert metrics["training/rollout_logprobs_diff_max"] == pytest.approx(0.1)
    assert metrics["training/off_policy/logprobs_diff_mean"] == pytest.approx(2.0)
    # e^2 - 1 - 2 of each of the two.
    assert metrics["training/off_policy/kl_k3"] == pytest.approx(4.389, abs=1e-3)
    older = training_metrics(rows, torch.zeros_like(fresh))
    assert "training/rollout_logprobs_diff_max" not in older
    assert older["training/off_policy/logprobs_diff_mean"] == pytest.approx((0.1 + 2 + 2) / 3)


def test_lengths_of_what_is_left_behind() -> None:
    """One of 10 tokens is generated in the time in which those of 2 to 4 are trained on."""
    rows = [row(0, tokens=range(length)) for length in (2, 2, 4, 4)]
    metrics = length_metrics(Experience(rows), max_response_length=16)
    assert metrics["response_length/p50"] == 4 and metrics["response_length/p99"] == 4
    assert not any("_drawn" in name for name in metrics), "no more than that was generated"
    metrics = length_metrics(Experience(rows, drawn=[2, 4, 10, 2, 4]), max_response_length=16)
    assert metrics["response_length_drawn/mean"] == pytest.approx(22 / 5)
    assert metrics["response_length_drawn/p90"] == 10
    assert metrics["response_length_ratio/p90"] == pytest.approx(0.4)
    assert metrics["response_length_ratio/mean"] == pytest.approx(3 / 4.4)
    failed = [row(0, tokens=range(10))]
    metrics = length_metrics(Experience(rows, left_out=failed), max_response_length=16)
    assert metrics["response_length_drawn/mean"] == pytest.approx(22 / 5)


def test_throughput() -> None:
    figures = {
        "timing_s/step": 10.0,
        "timing_s/generate": 2.0,
        "perf/total_num_tokens": 800.0,
        "perf/response_tokens": 300.0,
    }
    metrics = throughput_metrics(figures, devices=4)
    assert metrics["perf/throughput"] == 20 and metrics["perf/generate_tokens_per_s"] == 150
    refilled = throughput_metrics({**figures, "perf/generated_tokens": 900.0}, devices=4)
    assert refilled["perf/generate_tokens_per_s"] == 450
