"""What is said of a trajectory's tokens follows from who wrote them."""

from __future__ import annotations

import pytest

from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.rollout.api import written_by

PROMPT = Prompt((4, 5), "test", "9", {}, 7, "question")


def test_tokens_that_no_policy_wrote_are_in_the_response_and_not_trained_on() -> None:
    turns = (
        Span("sampled", (10, 11), (-0.5, -1.0), written_by(3), reward=0.25),
        Span("environment", (20,)),
        Span("template", (30, 31)),
        Span("sampled", (12, 13), (-2.0, -3.0), ((0, 4), (1, 6)), reward=-1.0),
    )
    row = Row(PROMPT.prompt_ids, turns)
    assert row.response_ids.tolist() == [10, 11, 20, 30, 31, 12, 13]
    assert row.response_mask.tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert row.logprobs.tolist() == [-0.5, -1.0, 0, 0, 0, -2.0, -3.0]
    assert row.turn_rewards.tolist() == [0, 0.25, 0, 0, 0, 0, -1]
    trajectory = Trajectory(PROMPT, 0, (row,), "stop")
    assert (trajectory.oldest_version, trajectory.newest_version) == (3, 6)
    assert (trajectory.response_length, trajectory.sampled_length) == (7, 4)


def test_a_trajectory_of_several_rows_is_one_of_all_their_turns() -> None:
    first = Row(
        (4, 5), (Span("sampled", (10, 11), (-0.5, -1.0), written_by(3)), Span("template", (30,)))
    )
    second = Row((4, 5, 10, 31), (Span("sampled", (12,), (-2.0,), written_by(4)),))
    trajectory = Trajectory(PROMPT, 0, (first, second), "stop")
    assert [span.token_ids for span in trajectory.turns] == [(10, 11), (12,)]
    assert (trajectory.oldest_version, trajectory.newest_version) == (3, 4)
    assert (trajectory.response_length, trajectory.sampled_length) == (4, 3)


def test_an_empty_answer_has_a_policy_and_no_tokens() -> None:
    row = Row(PROMPT.prompt_ids, (Span("sampled", (), (), written_by(5), reward=1.0),))
    trajectory = Trajectory(PROMPT, 0, (row,), "stop")
    assert trajectory.newest_version == 5 and trajectory.response_length == 0
    assert not row.response_ids and not row.response_mask and not row.turn_rewards


@pytest.mark.parametrize(
    "span",
    [
        ("sampled", (1, 2), (-1.0,), ((0, 0),)),
        ("sampled", (1,), (-1.0,), ()),
        ("sampled", (1,), (-1.0,), ((0, 0), (1, 1))),
        ("environment", (1,), (-1.0,), ()),
        ("template", (1,), (), ((0, 0),)),
        ("template", (1,), (), (), 0.5),
    ],
)
def test_only_sampled_tokens_have_logprobs_and_a_version_and_all_of_them(span: tuple) -> None:
    with pytest.raises(AssertionError):
        Span(*span)
