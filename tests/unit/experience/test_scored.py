"""The batch that is trained on: tokens, who wrote them, and which rows are compared."""

from __future__ import annotations

import torch
from support.experience import in_groups, prompt, row

from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import written_by


def test_batch_holds_tokens_authors_and_groups() -> None:
    turns = (
        Span("sampled", (8, 9), (-0.5, -1.5), written_by(1)),
        Span("environment", (20,)),
        Span("sampled", (10,), (-0.25,), written_by(1)),
    )
    talk = Trajectory(prompt(3, 2), 5, (Row((4, 4), turns),), "stop")
    rows = [ScoredTrajectory(talk, "", Score(1.0, Outcome.SCORED), 0.5), row(0.0, 2)]
    batch = Experience(rows).batch(pad_id=0)
    assert batch["input_ids"].tolist() == [[4, 4, 8, 9, 20, 10], [4, 7, 0, 0, 0, 0]]
    assert batch["prompt_lengths"].tolist() == [2, 1]
    assert batch["response_lengths"].tolist() == [4, 1], "the model reads what others wrote, too"
    assert batch["response_mask"].tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert batch["rollout_logprobs"].tolist() == [[-0.5, -1.5, 0, -0.25], [0, 0, 0, 0]]
    assert batch["group_ids"].tolist() == [5, 2] and batch["sequence"].tolist() == [0, 1]
    assert batch["rewards"].tolist() == [0.5, 0.0] and "greedy_rewards" not in batch


def talk(group: int, rewards: tuple[float, float], total: float) -> ScoredTrajectory:
    """Two turns, the second in a row of its own whose prompt is the conversation anew."""
    first = Row((4, 4), (Span("sampled", (8, 9), (-0.5, -1.5), written_by(1), rewards[0]),))
    second = Row((4, 9, 20), (Span("sampled", (10,), (-0.25,), written_by(1), rewards[1]),))
    trajectory = Trajectory(prompt(3, 2), group, (first, second), "stop")
    return ScoredTrajectory(trajectory, "", Score(1.0, Outcome.SCORED), total, greedy_reward=0.5)


def test_rows_of_a_trajectory_follow_each_other() -> None:
    """The last one has the reward of the end: the total without what the turns earned."""
    experience = Experience(
        [row(0.25, 2, greedy_reward=0.0), talk(5, (0.5, 0.125), 2.0), row(1.0, 6, greedy_reward=1)]
    )
    batch = experience.batch(pad_id=0)
    assert batch["input_ids"][2].tolist() == [4, 9, 20, 10]
    assert batch["trajectory_ids"].tolist() == batch["sequence"].tolist() == [0, 1, 1, 2]
    assert batch["group_ids"].tolist() == [2, 5, 5, 6]
    assert batch["rewards"].tolist() == [0.25, 0, 2.0 - 0.625, 1.0]
    assert batch["turn_rewards"].tolist() == [[0, 0], [0, 0.5], [0.125, 0], [0, 0]]
    assert batch["greedy_rewards"].tolist() == [0, 0.5, 0.5, 1]
    assert experience.rewards.tolist() == [0.25, 2.0, 1.0], "what groups are compared by"


def test_single_rows_without_turn_rewards_have_no_columns_for_trajectories() -> None:
    assert in_groups([1.0, 0.0], 2).batch(0).columns.keys() == {
        *("input_ids", "prompt_lengths", "response_lengths", "response_mask", "rollout_logprobs"),
        *("sequence", "group_ids", "rewards"),
    }


def test_reward_of_a_turn_without_tokens_goes_to_the_end() -> None:
    turns = (
        Span("sampled", (8,), (-0.5,), written_by(1), 0.5),
        Span("sampled", (), (), written_by(1), 0.25),
    )
    trajectory = Trajectory(prompt(3, 2), 5, (Row((4, 4), turns),), "stop")
    scored = ScoredTrajectory(trajectory, "", Score(1.0, Outcome.SCORED), 1.75)
    batch = Experience([scored]).batch(0)
    assert batch["turn_rewards"].tolist() == [[0.5]] and batch["rewards"].tolist() == [1.25]


def test_a_response_that_only_others_wrote_is_empty() -> None:
    spans = (Span("sampled", (), (), written_by(1)), Span("environment", (20, 21)))
    trajectory = Trajectory(prompt(3, 2), 5, (Row((4, 4), spans),), "length")
    experience = Experience([ScoredTrajectory(trajectory, "", Score(1.0, Outcome.SCORED), 1.0)])
    assert experience.written.tolist() == [False] and experience.lengths.tolist() == [2]


def test_greedy_rewards_are_a_column() -> None:
    experience = Experience([row(1.0, greedy_reward=0.25), row(0.0, greedy_reward=0.5)])
    assert experience.batch(0)["greedy_rewards"].tolist() == [0.25, 0.5]


def test_metrics_that_groups_are_compared_by() -> None:
    scores = [Score(2.0, Outcome.SCORED, {"acc": 1}), Score(3.0, Outcome.SCORED)]
    experience = Experience([row(score, reward=score.value - 1) for score in scores])
    assert experience.metric("acc").tolist() == [1, 3]
    assert experience.metric("score").tolist() == [2, 3]
    for name in ("seq_reward", "seq_final_reward"):
        assert experience.metric(name).tolist() == [1, 2]
    assert experience.metric("acc").dtype == torch.float32
