"""Sets of times."""

from __future__ import annotations

from rlhf3d.observability.profile.intervals import common, length, union, without


def test_union_joins_what_touches() -> None:
    assert union([(5, 7), (0, 2), (2, 3), (6, 9), (4, 4)]) == [(0, 3), (5, 9)]
    assert union([]) == []


def test_common_is_in_both() -> None:
    assert common([(0, 4), (6, 9)], [(1, 2), (3, 7)]) == [(1, 2), (3, 4), (6, 7)]
    assert common([(0, 4)], [(4, 5)]) == []


def test_without_is_the_rest() -> None:
    assert without([(0, 10)], [(0, 1), (3, 4), (9, 12)]) == [(1, 3), (4, 9)]
    assert without([(0, 2), (3, 10)], [(1, 5)]) == [(0, 1), (5, 10)]
    assert without([(0, 10)], []) == [(0, 10)]
    assert length(without([(0, 10)], [(2, 5)])) == 7
