"""What a training step reports of held-out answers is what `rlhf3d evaluate` would."""

from __future__ import annotations

import pytest
from support.experience import row

from rlhf3d.experience.accuracy import interval
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.trainer.validation import validation_metrics


def score(value: float, answer: str | None, **extra: float) -> Score:
    outcome = Outcome.UNPARSABLE if answer is None else Outcome.SCORED
    return Score(value, outcome, {"answer": answer, **extra})


def of_a(scores: list[Score], n: int) -> list[ScoredTrajectory]:
    """Groups of n, all of data source a."""
    return [row(one, i // n, data_source="a") for i, one in enumerate(scores)]


def test_figures_by_source() -> None:
    rows = [
        row(score(1, "4"), 0, data_source="a"),
        row(score(0, "5"), 0, data_source="a"),
        row(score(0, None), 2, data_source="b"),
        row(score(0, "5"), 1, data_source="a"),
        row(score(1, "\\frac12"), 2, data_source="b"),
        row(score(1, "4.0"), 1, data_source="a"),
    ]
    figures = validation_metrics(rows, "sampled")
    assert figures["val-core/a/acc/sampled"] == 0.5 and figures["val-core/b/acc/sampled"] == 0.5
    assert (figures["val-aux/a/num_prompts"], figures["val-aux/b/num_prompts"]) == (2, 1)
    assert (
        figures["val-aux/a/acc/sampled/pass@2"] == 1.0
        and figures["val-aux/a/acc/sampled/maj@2"] == 0.5
    )
    assert figures["val-aux/b/acc/sampled/maj@2"] == 1.0
    bounds = figures["val-aux/a/acc/sampled/ci_low"], figures["val-aux/a/acc/sampled/ci_high"]
    assert bounds == pytest.approx(interval([0.5, 0.5]))


def test_accuracy_leaves_the_other_parts_of_the_reward_out() -> None:
    scores = [score(1.2, "4", acc=1.0), score(0.2, "5", acc=0.0)]
    figures = validation_metrics(of_a(scores, 1), "greedy")
    assert figures["val-core/a/acc/greedy"] == 0.5
    assert set(figures) == {
        "val-core/a/acc/greedy",
        "val-aux/a/num_prompts",
        "val-aux/a/acc/greedy/ci_low",
        "val-aux/a/acc/greedy/ci_high",
    }


def test_a_reward_model_has_a_mean_and_its_error_and_alone_no_accuracy() -> None:
    """Two prompts of two completions: means 2 and 6, so 4 with a standard error of sqrt(8 / 2)."""
    said = [Score(9.0, Outcome.SCORED, {"reward_model": value}) for value in (1.0, 3.0, 5.0, 7.0)]
    figures = validation_metrics(of_a(said, 2), "sampled")
    assert figures == {
        "val-core/a/reward_model/sampled": 4.0,
        "val-aux/a/reward_model/sampled/se": pytest.approx(2.0),
        "val-aux/a/num_prompts": 2.0,
    }
    with_rule = [
        Score(s.value, s.outcome, {**s.extra, "acc": float(i > 1)}) for i, s in enumerate(said)
    ]
    both = validation_metrics(of_a(with_rule, 2), "sampled")
    assert both["val-core/a/acc/sampled"] == 0.5 and figures.items() <= both.items()
