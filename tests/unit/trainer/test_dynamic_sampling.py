"""Dynamic sampling: draws until enough groups have signal, and no longer than allowed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rlhf3d.data.loader import Prompt
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import Completion
from rlhf3d.trainer.dynamic_sampling import fill_with_signal
from rlhf3d.trainer.experience import Experience, Scored

numbers = iter(range(10**6))


def drawn(*scores: float, lengths: tuple[int, ...] | None = None) -> Scored:
    """Groups of two, each prompt with a number of its own."""
    lengths = lengths or (1,) * len(scores)
    indices = [next(numbers) for _ in range(len(scores) // 2) for _ in range(2)]
    prompts = [Prompt((1,), "test", "", {}, indices[i - i % 2], "") for i in range(len(scores))]
    completions = [Completion((7,) * length, (0.0,) * length, "stop", 0) for length in lengths]
    experience = Experience(prompts, completions, [""] * len(scores))
    return Scored(
        experience,
        [Score(s, Outcome.SCORED) for s in scores],
        torch.tensor([float(s) for s in scores]),
    )


def test_groups_without_signal_are_refilled() -> None:
    draws: Iterator[Scored] = iter(
        [drawn(1, 1, 0, 1), drawn(0, 0, 0, 0), drawn(0, 1, 1, 0), drawn(1, 0, 1, 0)]
    )
    scored, metrics = fill_with_signal(
        lambda: next(draws), groups=2, n=2, metric="acc", max_batches=4
    )
    assert scored.rewards.tolist() == [
        0,
        1,
        0,
        1,
    ]  # the second of the first draw, the first of the third
    assert metrics == {
        "train/num_gen_batches": 3,
        "filter_groups/generated": 6,
        "filter_groups/kept_share": 0.5,
        "filter_groups/surplus": 1,
        "filter_groups/generated_score/mean": pytest.approx(5 / 12),
        "perf/generated_tokens": 12,
    }
    assert len(list(draws)) == 1, "one draw more than needed"


def test_an_empty_response_is_no_signal() -> None:
    draws = iter([drawn(1, 0, 1, 0, lengths=(1, 0, 1, 1))])
    scored, _ = fill_with_signal(lambda: next(draws), groups=1, n=2, metric="acc", max_batches=1)
    assert [len(c.token_ids) for c in scored.experience.completions] == [1, 1]


def test_what_cannot_be_filled_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        fill_with_signal(lambda: drawn(0, 0, 0, 1), groups=4, n=2, metric="acc", max_batches=3)
    for wanted in (
        "after 3 batches only 3 of 6 groups differ in acc, 4 are needed",
        "max_num_gen_batches = 3",
        "0.25",
    ):
        assert wanted in str(caught.value)
