"""Which data-parallel rank takes which rows, with work as even as a greedy pass makes it.

Invariant: every row is placed exactly once, and the same costs give the same placement.
Pure: row numbers and costs only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceCost:
    """The work of one sequence of L tokens: L + quadratic x L².

    The unit is what the matrix products of one token cost.
    """

    quadratic: float = 0.0
    """Causal attention of L tokens, as a share of the matrix products of one token, over L²."""

    def __call__(self, length: int) -> float:
        return length + self.quadratic * length**2


def split_rows(costs: Sequence[float], parts: int, equal_counts: bool = True) -> list[list[int]]:
    """Return the rows of each part, ascending, with total costs about equal.

    Rows are dealt from the most to the least expensive. With fewer rows than parts some parts stay
    empty.

    With `equal_counts` rows are dealt in rounds of `parts`, the most expensive of a round to the
    part with the least so far. Counts differ by at most one, and totals by at most the most
    expensive row. Where `parts` divides the rows, totals differ by at most its cost minus the
    cheapest row's: a round turns a difference d of two totals into |d - e|, e being the opposed
    difference of the rows dealt.

    Without `equal_counts` each row goes to the part with the least so far: totals differ by at most
    the most expensive row, and counts by whatever that takes.
    """
    if parts < 1:
        raise ValueError(f"{len(costs)} rows over {parts} parts: there must be at least 1")

    def most_expensive_first(row: int) -> tuple[float, int]:
        # The row number breaks ties: equal costs always give the same placement.
        return -costs[row], row

    order = sorted(range(len(costs)), key=most_expensive_first)
    placed: list[list[int]] = [[] for _ in range(parts)]
    totals = [(0.0, part) for part in range(parts)]  # a heap: the part with the least is first
    round_size = parts if equal_counts else 1
    for start in range(0, len(order), round_size):
        rows = order[start : start + round_size]
        # Take all parts of a round before any is put back, so that none gets two of its rows.
        lightest = [heapq.heappop(totals) for _ in rows]
        for (total, part), row in zip(lightest, rows, strict=True):
            placed[part].append(row)
            heapq.heappush(totals, (total + costs[row], part))
    return [sorted(rows) for rows in placed]
