"""Placement of rows: each row once, equal counts, bounded imbalance, same answer every time."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf3d.batching.balance import micro_batches, padding_share, split_rows


@st.composite
def divisible(draw: st.DrawFn) -> tuple[list[int], int]:
    """Row lengths, and a number that divides their count."""
    parts = draw(st.integers(1, 6))
    count = parts * draw(st.integers(0, 8))
    return draw(st.lists(st.integers(0, 500), min_size=count, max_size=count)), parts


@given(divisible())
def test_split_places_every_row_once_in_equal_counts(case: tuple[list[int], int]) -> None:
    lengths, parts = case
    split = split_rows(lengths, parts)
    assert [len(rows) for rows in split] == [len(lengths) // parts] * parts
    assert sorted(row for rows in split for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in split)
    assert split == split_rows(lengths, parts)


@given(divisible())
def test_split_totals_differ_by_at_most_the_spread_of_lengths(case: tuple[list[int], int]) -> None:
    lengths, parts = case
    totals = [sum(lengths[row] for row in rows) for rows in split_rows(lengths, parts)]
    assert max(totals) - min(totals) <= max(lengths, default=0) - min(lengths, default=0)


def test_split_by_hand() -> None:
    # rounds: 9 8 | 5 1 -> the lighter part (8) takes the 5
    assert split_rows([1, 9, 5, 8], 2) == [[0, 1], [2, 3]]
    assert split_rows([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]


def test_split_beats_taking_rows_in_order() -> None:
    lengths = list(range(64))
    totals = [sum(lengths[row] for row in rows) for rows in split_rows(lengths, 4)]
    in_order = [sum(lengths[start : start + 16]) for start in range(0, 64, 16)]
    assert max(in_order) - min(in_order) == 768
    assert max(totals) - min(totals) <= 4


@pytest.mark.parametrize("parts", [0, 2])
def test_split_refuses_unequal_counts(parts: int) -> None:
    with pytest.raises(ValueError, match=f"3 rows do not divide over {parts} parts"):
        split_rows([1, 2, 3], parts)


@given(
    st.lists(st.integers(0, 500), max_size=40),
    st.integers(1, 6),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_micro_batches_place_every_row_once(lengths: list[int], size: int, sort: bool, random: Random) -> None:
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    batches = micro_batches(lengths, rows, size, sort=sort)
    sizes = {len(batch) for batch in batches}
    assert len(batches) == -(-len(rows) // size)
    assert max(sizes, default=0) <= size and max(sizes, default=0) - min(sizes, default=0) <= 1
    flat = [row for batch in batches for row in batch]
    if sort:
        assert sorted(flat) == sorted(rows)
        assert flat == [row for batch in micro_batches(lengths, sorted(rows), size) for row in batch]
    else:
        assert flat == rows


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4))
def test_number_of_micro_batches_is_a_multiple(count: int, size: int, multiple: int) -> None:
    wanted = -(-count // (size * multiple)) * multiple
    if wanted > count:
        with pytest.raises(ValueError, match=f"{count} rows cannot fill {wanted} micro-batches"):
            micro_batches([1] * count, range(count), size, multiple_of=multiple)
    else:
        assert len(micro_batches([1] * count, range(count), size, multiple_of=multiple)) == wanted


@given(divisible())
def test_sorting_never_pads_more(case: tuple[list[int], int]) -> None:
    lengths, size = case
    rows = range(len(lengths))
    sorted_share = padding_share(lengths, micro_batches(lengths, rows, size))
    assert 0.0 <= sorted_share <= padding_share(lengths, micro_batches(lengths, rows, size, sort=False)) + 1e-12


def test_micro_batches_by_hand() -> None:
    lengths = [3, 9, 4, 8, 100, 100]
    assert micro_batches(lengths, [0, 1, 2, 3], 2) == [[1, 3], [2, 0]]
    assert micro_batches(lengths, [3, 0, 1, 2], 2, sort=False) == [[3, 0], [1, 2]]
    assert micro_batches(lengths, [], 2) == []


def test_padding_share_by_hand() -> None:
    assert padding_share([3, 9, 4, 8], [[1, 3], [2, 0]]) == pytest.approx(1 - 24 / 26)
    assert padding_share([3, 9, 4, 8], [[1, 3], [2, 0]], multiple_of=4) == pytest.approx(1 - 24 / 32)
    assert padding_share([5, 5], [[0, 1]]) == 0.0
    assert padding_share([], []) == 0.0
