"""Groups with signal, and the penalty on overlong responses."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.algorithms.advantages import AdvantageInputs, compute_advantages
from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.algorithms.rewards import overlong_penalty, token_level_rewards


def test_equal_values_carry_no_signal() -> None:
    values = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.5])
    counted = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1])
    ids = torch.tensor([9, 9, 7, 7, 8, 8, 6, 6])
    assert groups_with_signal(values, counted, ids).tolist() == [False, False, True, False]
    shuffled = torch.tensor([3, 6, 0, 5, 7, 2, 4, 1])
    signal = groups_with_signal(values[shuffled], counted, ids[shuffled])
    assert signal.tolist() == [False, False, True, False], "by id, wherever the rows stand"


def test_an_empty_response_is_no_signal() -> None:
    """The only 0 of the group was never written; an all-empty group has none either."""
    values = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    counted = torch.tensor([1, 1, 0, 0, 0, 0])
    ids = torch.arange(6) // 3
    assert groups_with_signal(values, counted, ids).tolist() == [False, False]


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo"])
def test_signal_is_what_makes_advantages(name: str) -> None:
    """A group has an advantage other than 0 exactly when it has signal."""
    scores, lengths = (
        torch.tensor([0.1, 0.1, 0.1, 0.3, 0.2, 0.2, 0.0, 0.0]),
        [2, 1, 2, 1, 2, 2, 2, 0],
    )
    mask = (torch.arange(2) < torch.tensor(lengths)[:, None]).float()
    inputs = AdvantageInputs(token_level_rewards(scores, mask), mask, torch.arange(8) // 2)
    advantages, _ = compute_advantages(name, inputs)
    learns = (advantages.view(4, -1).abs() > 0).any(-1)
    assert (
        learns.tolist()
        == groups_with_signal(scores, mask.any(-1), inputs.group_ids).tolist()
        == [False, True, False, False]
    )


def test_overlong_penalty_by_hand() -> None:
    """Limit 20, buffer 8, factor 2: nothing up to 12 tokens, then -¼ a token, -2 at the limit."""
    lengths = torch.tensor([0, 12, 13, 16, 20])
    assert overlong_penalty(lengths, 20, 8, 2.0).tolist() == [0.0, 0.0, -0.25, -1.0, -2.0]
    for buffer_len in (0, 21):
        with pytest.raises(ValueError, match=f"reward.overlong_buffer.len={buffer_len}"):
            overlong_penalty(lengths, 20, buffer_len, 1.0)
