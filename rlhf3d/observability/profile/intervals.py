"""Sets of times, as intervals.

Invariant: what these functions return is in order, and no two intervals of it touch. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]
_FIRST, _LAST = -(1 << 62), 1 << 62


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """All that is in any of them."""
    found: list[Interval] = []
    for began, ended in sorted(intervals):
        if found and began <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        elif began < ended:
            found.append((began, ended))
    return found


def common(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """What is in both; each is a union."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        began, ended = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if began < ended:
            found.append((began, ended))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(wholes: Sequence[Interval], parts: Sequence[Interval]) -> list[Interval]:
    """What of `wholes` is in none of the parts; each is a union."""
    # Between the parts, as far as that goes.
    ends = [_FIRST, *(end for _, end in parts)]
    begins = [*(begin for begin, _ in parts), _LAST]
    return common(wholes, list(zip(ends, begins, strict=True)))


def length(intervals: Iterable[Interval]) -> int:
    """Of a union."""
    return sum(ended - began for began, ended in intervals)
