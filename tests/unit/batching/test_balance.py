"""Placement of rows: each row once, equal counts where wanted, bounded imbalance, same answer every
time.
"""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf3d.batching.balance import SequenceCost, split_rows

COSTS = st.lists(st.integers(0, 500), max_size=48)


@given(COSTS, st.integers(1, 6), st.booleans())
def test_split_places_every_row_once(costs: list[int], parts: int, equal: bool) -> None:
    split = split_rows(costs, parts, equal)
    assert len(split) == parts
    assert sorted(row for rows in split for row in rows) == list(range(len(costs)))
    assert all(rows == sorted(rows) for rows in split)
    assert split == split_rows(costs, parts, equal)


@given(COSTS, st.integers(1, 6))
def test_equal_counts(costs: list[int], parts: int) -> None:
    counts = [len(rows) for rows in split_rows(costs, parts)]
    assert max(counts) == ceil(len(costs) / parts) and min(counts) == len(costs) // parts


@given(COSTS, st.integers(1, 6), st.booleans())
def test_totals_differ_by_at_most_the_dearest_row(
    costs: list[int], parts: int, equal: bool
) -> None:
    totals = [sum(costs[row] for row in rows) for rows in split_rows(costs, parts, equal)]
    bound = max(costs, default=0)
    if equal and len(costs) % parts == 0:
        bound -= min(costs, default=0)
    assert max(totals) - min(totals) <= bound


def test_split_by_hand() -> None:
    # rounds: 9 8 | 5 1 -> the lighter part (8) takes the 5
    assert split_rows([1, 9, 5, 8], 2) == [[0, 1], [2, 3]]
    assert split_rows([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    # one at a time: 9 | 3 | 3 to the lighter | 3 again: 9 against 9
    assert split_rows([9, 3, 3, 3], 2, equal_counts=False) == [[0], [1, 2, 3]]
    assert split_rows([9, 3, 3, 3], 2) == [[0, 3], [1, 2]]
    assert split_rows([7], 3) == [[0], [], []]


def test_split_beats_taking_rows_in_order() -> None:
    lengths = list(range(64))
    totals = [sum(lengths[row] for row in rows) for rows in split_rows(lengths, 4)]
    in_order = [sum(lengths[start : start + 16]) for start in range(0, 64, 16)]
    assert max(in_order) - min(in_order) == 768
    assert max(totals) - min(totals) <= 4


def test_unequal_counts_balance_what_equal_ones_cannot() -> None:
    cost = SequenceCost(quadratic=0.01)
    costs = [cost(n) for n in [1000, *[100] * 15]]
    spread = {}
    for equal in (True, False):
        totals = [sum(costs[row] for row in rows) for rows in split_rows(costs, 2, equal)]
        spread[equal] = max(totals) / min(totals)
    # 11000 + 7 x 200 against 8 x 200, and 11000 against 15 x 200
    assert spread[True] == pytest.approx(7.75) and spread[False] == pytest.approx(11000 / 3000)


def test_split_refuses_no_parts() -> None:
    with pytest.raises(ValueError, match="3 rows over 0 parts"):
        split_rows([1, 2, 3], 0)
