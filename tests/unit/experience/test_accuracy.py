"""mean@n, pass@k, maj@k and intervals against brute force and known values."""

from __future__ import annotations

import itertools
import random

import pytest

from rlhf3d.experience.accuracy import (
    Answers,
    default_ks,
    interval,
    maj_at_k,
    majority_score,
    pass_at_k,
    summarize,
)


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, right: int) -> None:
    answers = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match=r"pass@0: k must be between 1 and the"):
        pass_at_k(n, right, 0)
    with pytest.raises(ValueError, match=rf"pass@{n + 1}"):
        pass_at_k(n, right, n + 1)


def test_the_majority_votes() -> None:
    assert majority_score([0, 1, 1], ["3", "4", "4"]) == 1.0
    assert majority_score([1, 0, 0], ["4", "3", "3"]) == 0.0
    assert majority_score([1, 0], ["4", "3"]) == 0.5  # a tie is a coin
    assert majority_score([0, 0, 1], [None, None, "4"]) == 1.0  # no answer, no vote
    assert majority_score([0, 0], [None, None]) == 0.0


def test_maj_at_k_uses_every_run_of_k() -> None:
    answers = Answers((1, 1, 0, 0, 0, 1), ("4", "4", "3", "3", "3", "4"))
    assert maj_at_k(answers, 6) == 0.5
    assert maj_at_k(answers, 3) == pytest.approx((1 + 0) / 2)
    assert maj_at_k(answers, 1) == pytest.approx(answers.mean)
    assert maj_at_k(answers, 4) == 0.5
    with pytest.raises(ValueError, match=r"maj@7"):
        maj_at_k(answers, 7)


def test_the_interval_of_single_answers_is_wilsons() -> None:
    low, high = interval([1.0] * 81 + [0.0] * 19)
    assert (low, high) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    assert interval([0.0] * 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="at least one prompt"):
        interval([])


def test_answers_to_one_prompt_count_as_one_draw() -> None:
    independent = interval([0.5] * 50 + [0.25] * 25 + [0.75] * 25)
    identical = interval([1.0] * 50 + [0.0] * 50)
    assert identical[1] - identical[0] > 2 * (independent[1] - independent[0])


@pytest.mark.parametrize(("chance", "prompts", "n"), [(0.5, 60, 4), (0.1, 200, 1), (0.02, 100, 8)])
def test_intervals_cover(chance: float, prompts: int, n: int) -> None:
    """Of 400 simulated evaluations about 95 % hold the true mean."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        values = [sum(draw.random() < chance for _ in range(n)) / n for _ in range(prompts)]
        low, high = interval(values)
        held += low <= chance <= high
    assert 0.92 <= held / 400 <= 0.995


def test_summary() -> None:
    prompts = [
        Answers((1, 0, 1, 0), ("a", "b", "a", "c")),
        Answers((0, 0, 0, 0), ("x", None, None, None)),
    ]
    figures = summarize(prompts)
    assert figures["mean@4"] == 0.25 and figures["prompts"] == 2
    assert figures["pass@1"] == pytest.approx(0.25) and figures["pass@4"] == 0.5
    assert figures["pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    assert figures["maj@4"] == 0.5 and "maj@1" not in figures
    assert figures["std@4"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert 0.0 < figures["ci_low"] < 0.25 < figures["ci_high"] < 1.0
    assert set(summarize(prompts, [2])) == {
        "mean@4",
        "ci_low",
        "ci_high",
        "prompts",
        "std@4",
        "pass@2",
        "maj@2",
    }
    assert set(summarize([Answers((1,))])) == {"mean@1", "ci_low", "ci_high", "prompts"}
    assert "maj@2" not in summarize([Answers((1, 0))])
    with pytest.raises(ValueError, match=r"prompts have \[1, 2\] answers"):
        summarize([Answers((1,)), Answers((1, 0))])


def test_default_ks() -> None:
    assert default_ks(1) == [1] and default_ks(4) == [1, 2, 4] and default_ks(6) == [1, 2, 4, 6]
