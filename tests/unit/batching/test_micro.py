"""Micro-batches: each row once, as many on every rank, never over the budget, few and with little
padding.
"""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.batching.micro import MicroBatching, plan_micro_batches

BUDGET = 96
RULES = [
    MicroBatching(rows=3, tokens=tokens, packed=packed, multiple_of=multiple)
    for tokens, packed, multiple in product((None, BUDGET), (False, True), (1, 4, 32))
]


@st.composite
def ranks(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of rows, and the rows of one to four ranks, some perhaps without any."""
    lengths = draw(st.lists(st.integers(1, BUDGET), min_size=1, max_size=24))
    rows_of: list[list[int]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for row in range(len(lengths)):
        rows_of[draw(st.integers(0, len(rows_of) - 1))].append(row)
    return lengths, rows_of


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(deadline=None)
@given(case=ranks(), multiple=st.sampled_from([1, 2, 4]))
def test_every_row_once_in_as_many_micro_batches_on_every_rank(
    rule: MicroBatching, case: tuple[list[int], list[list[int]]], multiple: int
) -> None:
    lengths, rows_of = case
    plan = plan_micro_batches(lengths, rows_of, rule, multiple)
    count = len(plan[0])
    assert count and count % multiple == 0
    for rows, batches in zip(rows_of, plan, strict=True):
        assert len(batches) == count
        assert sorted(row for batch in batches for row in batch) == sorted(rows)
        sizes = [
            rule.positions([lengths[row] for row in batch]) if batch else 0 for batch in batches
        ]
        assert sizes == sorted(sizes, reverse=True), "the biggest come first, fillers last"
        if rule.tokens is None:
            assert all(len(batch) <= rule.rows for batch in batches)
        else:
            assert max(sizes) <= rule.tokens
    assert plan == plan_micro_batches(lengths, rows_of, rule, multiple)


@pytest.mark.parametrize("packed", [False, True])
def test_the_bound_holds(packed: bool) -> None:
    """Eight sequences of 7 tokens under a budget of 8: two would be 14."""
    (batches,) = plan_micro_batches([7] * 8, [range(8)], MicroBatching(1, tokens=8, packed=packed))
    assert sorted(batches) == [[row] for row in range(8)]


def test_fixed_by_hand() -> None:
    lengths = [3, 9, 4, 8, 100, 100]
    assert plan_micro_batches(lengths, [[0, 1, 2, 3]], MicroBatching(2)) == [[[1, 3], [2, 0]]]
    # packed there is nothing to pad: two micro-batches of 12 tokens instead of 17 and 7
    assert plan_micro_batches(lengths, [[0, 1, 2, 3]], MicroBatching(2, packed=True)) == [
        [[0, 1], [2, 3]]
    ]


def test_budget_by_hand() -> None:
    lengths = [2, 9, 4, 3, 3]
    # Padded: 9 | 4 3 3 2 is 9 and 16 positions.
    assert plan_micro_batches(lengths, [range(5)], MicroBatching(1, tokens=16)) == [
        [[2, 3, 4, 0], [1]]
    ]
    # With 12 also 9 | 4 3 3 | 2 and 9 | 4 3 | 3 2 would do, but 9 | 4 | 3 3 2 has fewest positions:
    # 22.
    assert plan_micro_batches(lengths, [range(5)], MicroBatching(1, tokens=12)) == [
        [[1], [3, 4, 0], [2]]
    ]
    # Packed: 21 tokens fill two of 12, evenly 9 + 2 and 4 + 3 + 3.
    assert plan_micro_batches(lengths, [range(5)], MicroBatching(1, tokens=12, packed=True)) == [
        [[0, 1], [2, 3, 4]]
    ]


def test_budget_counts_the_rounding_of_sequence_parallelism() -> None:
    """Padded to multiples of 4, three rows of 5 take 24 positions.

    Packed, their 15 tokens take 16.
    """
    for packed, positions in ((False, 24), (True, 16)):
        rule = MicroBatching(1, tokens=positions, packed=packed, multiple_of=4)
        assert rule.positions([5, 5, 5]) == positions
        assert [len(b) for b in plan_micro_batches([5] * 3, [range(3)], rule)[0]] == [3]
        tight = MicroBatching(1, tokens=positions - 1, packed=packed, multiple_of=4)
        assert sorted(len(b) for b in plan_micro_batches([5] * 3, [range(3)], tight)[0]) == [1, 2]


def test_even_packing_falls_back_where_it_would_break_the_budget() -> None:
    """6 5 5 | 8 8 fits 16 twice; dealt evenly, longest first, 8 6 5 would be 19."""
    (batches,) = plan_micro_batches(
        [8, 8, 6, 5, 5], [range(5)], MicroBatching(1, tokens=16, packed=True)
    )
    assert sorted(map(sorted, batches)) == [[0, 1], [2, 3, 4]]


def test_the_number_is_the_busiest_ranks_and_others_split_up_or_idle() -> None:
    lengths = [8, 8, 8, 2, 2, 1]
    plan = plan_micro_batches(
        lengths, [[0, 1, 2], [3, 4, 5], []], MicroBatching(1, tokens=8), multiple_of=2
    )
    assert [[len(batch) for batch in batches] for batches in plan] == [
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
    ]


@settings(deadline=None)
@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=10))
def test_padded_budget_is_optimal(lengths: list[int]) -> None:
    """No cut of the sorted rows has fewer micro-batches, or as many with fewer positions."""
    order = sorted(lengths, reverse=True)
    best = (len(order) + 1, 0)
    for cuts in product([False, True], repeat=len(order) - 1):
        runs, run = [], [order[0]]
        for length, cut in zip(order[1:], cuts, strict=True):
            runs, run = ([*runs, run], [length]) if cut else (runs, [*run, length])
        sizes = [len(run) * run[0] for run in [*runs, run]]
        if max(sizes) <= BUDGET:
            best = min(best, (len(sizes), sum(sizes)))
    rule = MicroBatching(1, tokens=BUDGET)
    (batches,) = plan_micro_batches(lengths, [range(len(lengths))], rule)
    assert (len(batches), sum(rule.positions([lengths[r] for r in b]) for b in batches)) == best


@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=40))
def test_packing_wastes_little(lengths: list[int]) -> None:
    """First fit, longest first, needs at most 11/9 of the fewest possible and one more."""
    rule = MicroBatching(1, tokens=BUDGET, packed=True)
    (batches,) = plan_micro_batches(lengths, [range(len(lengths))], rule)
    padded = plan_micro_batches(lengths, [range(len(lengths))], MicroBatching(1, tokens=BUDGET))[0]
    assert len(batches) <= len(padded)
    halves = sum(length > BUDGET / 2 for length in lengths)
    assert len(batches) <= max(halves, 2 * sum(lengths) / BUDGET + 1)


def test_a_sequence_over_the_budget_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        ValueError, match=r"ppo_max_token_len_per_gpu = 8: a sequence of 9 tokens takes 9 positions"
    ):
        plan_micro_batches([3, 9], [[0, 1]], MicroBatching(1, tokens=8))
    with pytest.raises(
        ValueError, match=r"takes 12 positions \(rounded up to a multiple of 4\); set at least 12"
    ):
        plan_micro_batches([3, 9], [[0, 1]], MicroBatching(1, tokens=11, multiple_of=4))
