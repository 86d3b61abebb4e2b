"""Which data-parallel rank takes which rows: work as even as a greedy pass makes it.

Invariant: every row is placed exactly once, and the same costs give the same placement.
Pure: row numbers and costs only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceCost:
    """Work of one sequence of L tokens, in units of what one token's matrix products cost: L + quadratic x L²."""

    quadratic: float = 0.0
    """Causal attention of L tokens, as a share of the matrix products of one token, divided by L²."""

    def __call__(self, length: int) -> float:
        return length + self.quadratic * length**2


def split_rows(costs: Sequence[float], parts: int, equal_counts: bool = True) -> list[list[int]]:
    """Rows of each part, ascending, total costs as even as a greedy pass makes them, dearest rows first.

    With `equal_counts` rows are dealt in rounds of `parts`, the dearest of a round to the part that has least so far:
    counts differ by at most one, and totals by at most the dearest row; by at most dearest minus cheapest where
    `parts` divides the rows, as a round turns a difference d of two totals into |d - e|, e being the opposed
    difference of the rows dealt. Without it each row goes to the part that has least: totals differ by at most the
    dearest row, counts by whatever that takes. With fewer rows than parts some parts stay empty.
    """
    if parts < 1:
        raise ValueError(f"{len(costs)} rows over {parts} parts: there must be at least 1")
    order = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    placed: list[list[int]] = [[] for _ in range(parts)]
    totals = [(0.0, part) for part in range(parts)]  # a heap: the part that has least is first
    dealt = parts if equal_counts else 1
    for start in range(0, len(order), dealt):
        lightest = [heapq.heappop(totals) for _ in order[start : start + dealt]]
        for (total, part), row in zip(lightest, order[start : start + dealt], strict=True):
            placed[part].append(row)
            heapq.heappush(totals, (total + costs[row], part))
    return [sorted(rows) for rows in placed]
