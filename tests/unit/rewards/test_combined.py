"""Rule and reward model together: by hand, with real scoring processes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.reward_model import ModelPart, ModelScore, only_model
from rlhf3d.rewards.score import Outcome, Score, ScoreItem

ITEMS = [
    ScoreItem("src", text, "4", messages=[{"role": "user", "content": "2 + 2"}])
    for text in ("4", "five", "!")
]


class Lengths:
    """A reward model that gives the completion's length, and cut those of one character."""

    def scores(self, items: Sequence[ScoreItem]) -> list[ModelScore]:
        assert all(item.messages for item in items)
        return [
            ModelScore(float(len(item.solution_str)), len(item.solution_str) == 1) for item in items
        ]


class Rule(RewardFunction):
    def score_items(self, items: Sequence[ScoreItem]) -> list[float]:
        if items[0].solution_str == "!":
            raise ValueError("unreadable")
        return [float(item.solution_str == item.ground_truth) for item in items]


def test_both_by_weights() -> None:
    with RewardManager(Rule(), workers=1, timeout_s=20.0) as pool:
        pool.add_model(Lengths(), ModelPart(0.5, mean=2.0, std=4.0))
        batch = pool.start(3)
        batch.add({2: ITEMS[2], 0: ITEMS[0]})
        batch.add({1: ITEMS[1]})
        right, wrong, failed = batch.finish()
    assert right.value == pytest.approx(1.0 + 0.5 * (1 - 2) / 4) and right.accuracy == 1.0
    assert wrong.value == pytest.approx(0.0 + 0.5 * (4 - 2) / 4) and wrong.accuracy == 0.0
    assert right.extra == {"reward_model": 1.0, "reward_model_cut": True, "acc": 1.0}
    assert (
        failed.outcome is Outcome.ERROR
        and failed.value == 0.0
        and "reward_model" not in failed.extra
    )
    assert not only_model([right, wrong])


def test_alone_everything_is_scored_and_nothing_is_right() -> None:
    rewards = RewardManager(None)
    rewards.add_model(Lengths(), ModelPart(2.0))
    batch = rewards.start(2)
    batch.add(dict(enumerate(ITEMS[:2])))
    scores = batch.finish()
    assert [(s.value, s.outcome) for s in scores] == [(2.0, Outcome.SCORED), (8.0, Outcome.SCORED)]
    assert only_model(scores)
    assert not only_model([Score(1.0, Outcome.SCORED)]) and not only_model([])
