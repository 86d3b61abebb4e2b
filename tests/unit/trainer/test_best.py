"""Which figure checkpoints are kept by."""

from __future__ import annotations

import math

import pytest

from rlhf3d.trainer.best import BestTracker

ACC = "val-core/gsm8k/acc/greedy"


def test_follows_the_first_accuracy() -> None:
    best = BestTracker(None)
    assert best.of({ACC: 0.5}) == {}
    for step, value in ((0, 0.3), (2, 0.7), (4, 0.5)):
        best.update(step, {"val-core/gsm8k/count": 9, ACC: value, "val-core/math/acc/greedy": 1.0})
    assert (best.name, best.value, best.step) == (ACC, 0.7, 2)
    assert (
        best.of({ACC: 0.5}) == {ACC: 0.5}
        and best.of({"actor/loss": 1.0}) == {}
        and best.of({ACC: math.nan}) == {}
    )


def test_goes_on_after_a_resume_unless_another_is_asked_for() -> None:
    best = BestTracker(None)
    best.update(2, {ACC: 0.7})
    again, other = BestTracker(None), BestTracker("val-aux/reward")
    for made in (again, other):
        made.load_state_dict(best.state_dict())
    assert (again.name, again.value, again.step) == (ACC, 0.7, 2)
    assert (other.name, other.value) == ("val-aux/reward", -math.inf)
    before_training, resumed = BestTracker(None), BestTracker(None)
    before_training.update(0, {ACC: 0.3})
    resumed.load_state_dict(before_training.state_dict())
    assert (resumed.name, resumed.value, resumed.step) == (ACC, 0.3, 0)
    fresh = BestTracker(None)
    fresh.load_state_dict(BestTracker(None).state_dict())
    assert fresh.name is None


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(
        ValueError, match=r"trainer\.best_metric = acc: validation has val-core/gsm8k/acc/greedy"
    ):
        BestTracker("acc").update(1, {ACC: 0.5})
