"""Figures of a step, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.batching.batch import from_sequences
from rlhf3d.rewards.scoring import Outcome, Score
from rlhf3d.rollout.api import Completion
from rlhf3d.trainer.metrics import length_metrics, score_metrics, throughput_metrics, training_metrics


def completion(tokens: int, reason: str = "stop") -> Completion:
    return Completion(tuple(range(tokens)), (0.0,) * tokens, reason, 0)  # type: ignore[arg-type]


def test_score_metrics_count_outcomes_and_mixed_groups() -> None:
    scores = [
        Score(1.0, Outcome.SCORED),
        Score(0.0, Outcome.SCORED),
        Score(0.0, Outcome.UNPARSABLE),
        Score(0.0, Outcome.ERROR),
    ]
    metrics = score_metrics(scores, n=2)
    assert metrics["critic/score/mean"] == 0.25
    assert metrics["reward/mixed_groups_share"] == 0.5
    counts = {outcome: metrics[f"reward/outcome/{outcome.value}"] for outcome in Outcome}
    assert counts == {Outcome.SCORED: 2, Outcome.UNPARSABLE: 1, Outcome.ERROR: 1, Outcome.TIMEOUT: 0}


def test_length_metrics() -> None:
    metrics = length_metrics([completion(2), completion(4, "length"), completion(0)], torch.tensor([3, 5, 4]))
    assert metrics["response_length/mean"] == 2 and metrics["response_length/max"] == 4
    assert metrics["response_length/clip_ratio"] == pytest.approx(1 / 3)
    assert metrics["response/aborted_ratio"] == pytest.approx(1 / 3)
    assert metrics["prompt_length/mean"] == 4


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
    metrics = training_metrics(rows)
    assert metrics["critic/advantages/mean"] == 2 and metrics["critic/advantages/max"] == 3
    assert metrics["critic/rewards/mean"] == 0.75
    assert metrics["critic/vf_explained_var"] == 1
    assert metrics["training/rollout_logprobs_diff_max"] == pytest.approx(0.5)


def test_throughput() -> None:
    metrics = throughput_metrics(
        {
            "timing_s/step": 10.0,
            "timing_s/generate": 2.0,
            "perf/total_num_tokens": 800.0,
            "perf/response_tokens": 300.0,
        },
        ranks=4,
    )
    assert metrics["perf/throughput"] == 20 and metrics["perf/generate_tokens_per_s"] == 150
