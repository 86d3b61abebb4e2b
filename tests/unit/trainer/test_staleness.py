"""How old the tokens of a step are, by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from support.experience import prompt

from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import Versions
from rlhf3d.trainer.metrics import OFF_POLICY, length_metrics
from rlhf3d.trainer.staleness import fresh_tokens, staleness_metrics


def said(tokens: int, *versions: tuple[int, int]) -> Span:
    return Span("sampled", (7,) * tokens, (-1.0,) * tokens, versions)


def scored(*rows: Sequence[Span]) -> ScoredTrajectory:
    made = [Row((4,), tuple(spans)) for spans in rows]
    trajectory = Trajectory(prompt(0), 0, tuple(made), "stop")
    return ScoredTrajectory(trajectory, "", Score(1.0, Outcome.SCORED), 1.0)


OBSERVATION = Span("environment", (5, 5))
EXPERIENCE = Experience(
    [
        # Of 4 tokens one by version 3, one by 4 and, in the second row, two by 5.
        scored([said(1, (0, 3)), OBSERVATION, said(1, (0, 4))], [said(2, (0, 5))]),
        scored([said(3, (0, 4), (1, 5))]),
        scored([said(1, (0, 5))]),
        # A turn without tokens: version 2 chose to end there.
        scored([said(0, (0, 2))]),
    ]
)


def test_staleness_by_trajectory_and_by_token() -> None:
    metrics = staleness_metrics(EXPERIENCE, 6)
    off_policy = {name.removeprefix("training/off_policy/"): x for name, x in metrics.items()}
    assert off_policy == {
        "trajectory_staleness/mean": (1 + 1 + 1 + 4) / 4,
        "trajectory_staleness/max": 4,
        "trajectory_staleness/min": 1,
        "trajectory_staleness_worst/mean": (3 + 2 + 1 + 4) / 4,
        "trajectory_staleness_worst/max": 4,
        "trajectory_staleness_worst/min": 1,
        "trajectory_spans/mean": (3 + 2 + 1 + 1) / 4,
        "trajectory_spans/max": 3,
        "trajectory_spans/min": 1,
        "partial_ratio": 0.5,
        "token_staleness/mean": (3 + 2 + 1 + 1 + 2 + 1 + 1 + 1) / 8,
    }


def test_they_are_documented() -> None:
    documented = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    for name in (*staleness_metrics(EXPERIENCE, 6), *OFF_POLICY):
        mean = re.sub("/(max|min)$", "/mean", name).replace("_diff_max", "_diff_mean")
        assert f"`{mean}`" in documented, name
    drawn = length_metrics(Experience(EXPERIENCE.trajectories, drawn=[3]), 4)
    for name in drawn:
        leaf = f"`/{name.rpartition('/')[2]}`"
        assert f"`{name}`" in documented or leaf in documented, name


def test_a_step_without_tokens_has_no_age() -> None:
    metrics = staleness_metrics(Experience([scored([said(0, (0, 2))])]), 2)
    assert metrics["training/off_policy/token_staleness/mean"] == 0


def test_tokens_of_the_version_that_is_trained() -> None:
    """Where they stand in the batch; observations are nobody's."""
    fresh = fresh_tokens(EXPERIENCE, 5)
    assert fresh.tolist() == [
        [False] * 4,
        [True, True, False, False],
        [False, True, True, False],
        [True, False, False, False],
        [False] * 4,
    ]
    batch = EXPERIENCE.batch(pad_id=0)
    assert fresh.shape == batch["response_mask"].shape
    every = torch.zeros_like(fresh)
    for version in (2, 3, 4, 5):
        every |= fresh_tokens(EXPERIENCE, version)
    assert torch.equal(every, batch["response_mask"].bool()), "each token has one version"


def test_empty_completions_have_a_column() -> None:
    nothing: Versions = ((0, 2),)
    experience = Experience([scored([Span("sampled", (), (), nothing)])])
    assert fresh_tokens(experience, 2).tolist() == [[False]]
