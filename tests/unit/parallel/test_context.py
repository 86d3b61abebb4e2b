"""Which positions a context-parallel rank holds."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.parallel.context import gathered_order, held_chunks, held_positions

RUNS = [[0, 16], [0, 8, 24, 32], [0, 48, 56]]


def test_a_rank_holds_a_chunk_from_either_end_of_each_sequence() -> None:
    assert held_positions([0, 8], 2, 0).tolist() == [0, 1, 6, 7]
    assert held_positions([0, 8], 2, 1).tolist() == [2, 3, 4, 5]
    assert held_positions([0, 4, 12], 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert held_positions([0, 3, 5], 1, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ends", RUNS)
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_hold_every_position_once_and_are_put_in_order_again(
    ends: list[int], cp: int
) -> None:
    gathered = torch.cat([held_positions(ends, cp, rank) for rank in range(cp)])
    assert sorted(gathered.tolist()) == list(range(ends[-1]))
    assert gathered[gathered_order(ends, cp)].tolist() == list(range(ends[-1]))


@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_attends_to_as_many_positions(cp: int) -> None:
    def work(rank: int) -> int:
        held = ((range(c.start, c.stop), c.sequence) for c in held_chunks([0, 16, 48], cp, rank))
        return sum(
            position - sequence + 1 for positions, sequence in held for position in positions
        )

    assert len({work(rank) for rank in range(cp)}) == 1


def test_a_sequence_that_does_not_divide_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="6 positions over 2 x 2 chunks"):
        held_chunks([0, 6], 2, 0)
