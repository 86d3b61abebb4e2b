"""Format and length parts, and their weighted sum."""

from __future__ import annotations

import pytest

from rlhf3d.config.schema import CustomRewardConfig, RewardConfig
from rlhf3d.data.rows import NO_SOURCE
from rlhf3d.rewards.make import make_reward
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.parts import WeightedReward, format_score
from rlhf3d.rewards.score import Outcome, Score, ScoreItem
from rlhf3d.rewards.scorers import BuiltinReward


@pytest.mark.parametrize(
    ("form", "text", "worth"),
    [
        ("boxed", r"so \boxed{4}", 1.0),
        ("boxed", r"\boxed{3} or \boxed{4}", 0.0),
        ("boxed", r"\boxed{", 0.0),
        ("boxed", r"\boxed{}", 0.0),
        ("boxed", "4", 0.0),
        ("hashes", "#### 4", 1.0),
        ("hashes", "#### 4\n#### 5", 0.0),
        ("hashes", "#### four", 0.0),
        ("think", "<think>a\nb</think>\nThe answer is 4", 1.0),
        ("think", "<think>a</think> ", 0.0),
        ("think", "<think>a</think></think>", 0.0),
        ("think", "<think>a</think>4</think>", 0.0),
        ("think", "<think>a</think> 4 </think ", 1.0),
        ("think", "<think>a<think>b</think>c", 0.0),
        ("think", "<think>a</think>b<think>c</think>d", 0.0),
        ("think", "x <think>a</think> 4", 0.0),
        ("think", "a</think> 4", 0.0),
    ],
)
def test_forms(form: str, text: str, worth: float) -> None:
    assert format_score(text, form) == worth


def test_hostile_forms_are_quick() -> None:
    for text in (
        "<think>" * 150_000,
        "<think>" + "a" * 1_000_000,
        "\\boxed{" * 150_000,
        "#" * 1_000_000,
    ):
        for form in ("think", "boxed", "hashes"):
            assert format_score(text, form) == 0.0


def item(text: str) -> ScoreItem:
    return ScoreItem("openai/gsm8k", text, "4")


def weighted(**weights: float) -> WeightedReward:
    return WeightedReward(BuiltinReward("strict"), weights, "hashes")


def test_the_sum_states_its_parts_and_keeps_accuracy_apart() -> None:
    reward = WeightedReward(BuiltinReward("flexible"), {"accuracy": 1.0, "format": 0.25}, "hashes")
    texts = ["#### 4", "#### 5", "4", "four"]
    right, wrong, unhashed, none = reward.score_items([item(text) for text in texts])
    assert (right.value, right.accuracy) == (1.25, 1.0)
    assert (wrong.value, wrong.accuracy) == (0.25, 0.0)
    assert (unhashed.value, unhashed.accuracy) == (1.0, 1.0)
    assert (none.value, none.outcome) == (0.0, Outcome.UNPARSABLE)
    assert right.extra == {"answer": "4", "accuracy": 1.0, "format": 1.0, "acc": 1.0}
    assert Score(0.5, Outcome.SCORED).accuracy == 0.5


def test_it_works_in_the_pool_and_failures_earn_nothing() -> None:
    broken = ScoreItem("openai/gsm8k", "#### 4", "no number")
    with RewardManager(weighted(accuracy=1.0, format=1.0), workers=1, timeout_s=20.0) as pool:
        right, failed = pool.score_batch([item("#### 4"), broken])
    assert (right.value, right.accuracy) == (2.0, 1.0)
    assert (failed.value, failed.outcome) == (0.0, Outcome.ERROR)


def test_mistakes_in_weights_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"reward\.weights: no part 'style'; there are accuracy, format"
    ):
        weighted(style=1.0)
    with pytest.raises(ValueError, match=r"reward\.format: no 'prose'"):
        WeightedReward(BuiltinReward(), {"format": 1.0}, "prose")


def test_a_configuration_becomes_the_right_function() -> None:
    plain, builtin = RewardConfig(), CustomRewardConfig()
    assert make_reward(plain, builtin, ["openai/gsm8k"]) == BuiltinReward(
        "flexible", ("openai/gsm8k",)
    )
    form = RewardConfig(weights={"format": 0.5}, format="hashes")
    summed = make_reward(form, builtin, ["openai/gsm8k"])
    assert isinstance(summed, WeightedReward)
    assert [s.value for s in summed.score_items([item("#### 5"), item("5")])] == [0.5, 0.0]
    with pytest.raises(ValueError, match="no built-in scorer for data_source 'mine'"):
        make_reward(plain, builtin, ["mine"])
    # Of data without the column: a rule of the run, or of an evaluation.
    with pytest.raises(ValueError, match=r"without the column data_source.*environment: 1\.0"):
        make_reward(plain, builtin, [NO_SOURCE])
    alone = RewardConfig(weights={"environment": 1.0})
    assert make_reward(alone, builtin, [NO_SOURCE]) is None
    with pytest.raises(ValueError, match="no such file"):
        make_reward(plain, CustomRewardConfig(path="nowhere.py"), ["mine"])
