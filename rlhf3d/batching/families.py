"""Micro-batches of rows that share their beginnings (`prefixes`): rows of a family stay together.

Invariant: as in `micro` and `units`: every row is in exactly one micro-batch, the rows of a unit
together and in order, all ranks get the same number of micro-batches, and none is over the rule's
limit.
In the order of their tokens, what a row shares with any row before it, it shares with its neighbor.
So ranks and micro-batches are runs of units in that order, and what a run takes is a sum.
Pure: token numbers and counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.micro import MicroBatching, check_budget
from rlhf3d.batching.prefixes import SortedRows, sort_rows, tree_tokens
from rlhf3d.batching.units import Unit, check_limit
from rlhf3d.units import round_up


@dataclass(frozen=True)
class Rows:
    """What is known of a batch's rows."""

    lengths: list[int]
    strings: list[bytes] | None = None
    """See `token_strings`; None where the rule shares no prefixes."""

    def positions(self, rows: Sequence[int], rule: MicroBatching) -> int:
        """Return the positions of a micro-batch of these rows."""
        found = self._sorted(rows)
        if found is None or not any(found.shared):
            return rule.positions([self.lengths[row] for row in rows])
        return rule.width(tree_tokens(found, self.lengths))

    def tokens(self, rows: Sequence[int]) -> int:
        """Return the tokens of a micro-batch of these rows, those in common once."""
        found = self._sorted(rows)
        if found is None:
            return sum(self.lengths[row] for row in rows)
        return tree_tokens(found, self.lengths)

    def _sorted(self, rows: Sequence[int]) -> SortedRows | None:
        return None if self.strings is None else sort_rows(rows, self.strings)


@dataclass(frozen=True)
class _Item:
    """A unit, in the order of the first rows' tokens."""

    unit: Unit
    lengths: list[int]
    tokens: int
    """Of its rows, those in common once."""
    shared: int
    """Leading tokens that its first row has in common with that of the item before it."""
    cost: float
    """Work behind those."""

    @property
    def shares(self) -> bool:
        """Whether it begins as the item before it does, or its rows alike."""
        return self.shared > 0 or self.tokens < sum(self.lengths)


def plan_families(
    rows: Rows,
    units: Sequence[Unit],
    rule: MicroBatching,
    ranks: int,
    cost: SequenceCost,
    multiple_of: int = 1,
) -> list[list[list[int]]] | None:
    """Return the micro-batches of each rank, equally many on every rank, as `plan_micro_batches`.

    None where no two units begin with the same token, and no rows of a unit: nothing is shared.
    Raises ValueError for a row or unit over the limit.
    """
    items = _items(rows, units, cost)
    if not any(item.shares for item in items):
        return None
    check_budget(rows.lengths, rule)
    for item in items:
        if not _Run().with_item(item).fits(rule):
            check_limit(rows.lengths, item.unit, rule)
    planned = [_runs(part, rule) for part in _parts(items, ranks)]
    count = round_up(max(map(len, planned)), multiple_of)
    # A filler costs one position; a run that is cut computes again what its parts share.
    for runs in planned:
        runs.extend([] for _ in range(count - len(runs)))
    return planned


def _items(rows: Rows, units: Sequence[Unit], cost: SequenceCost) -> list[_Item]:
    assert rows.strings is not None, "the rule shares no prefixes"
    unit_of = {unit[0]: unit for unit in units}
    found = sort_rows(list(unit_of), rows.strings)
    items = []
    for first, shared in zip(found.order, found.shared, strict=True):
        own = sort_rows(unit_of[first], rows.strings)
        work = -cost(shared)
        for row, begun in zip(own.order, own.shared, strict=True):
            work += cost(rows.lengths[row]) - cost(begun)
        lengths = [rows.lengths[row] for row in own.order]
        tokens = tree_tokens(own, rows.lengths)
        items.append(_Item(unit_of[first], lengths, tokens, shared, work))
    return items


def _parts(items: Sequence[_Item], ranks: int) -> list[list[_Item]]:
    """Runs of about equal work, one a rank."""
    parts: list[list[_Item]] = [[] for _ in range(ranks)]
    total, before = sum(item.cost for item in items), 0.0
    for item in items:
        middle = (before + item.cost / 2) / total
        parts[min(int(middle * ranks), ranks - 1)].append(item)
        before += item.cost
    return parts


@dataclass(frozen=True)
class _Run:
    """Items that follow each other, in one micro-batch."""

    rows: int = 0
    all_tokens: int = 0
    longest: int = 0
    tokens: int = 0
    """Those in common once. Where units of several rows share more than the beginnings of their
    first rows, fewer are computed."""
    first_shared: int = 0
    """Of the first item: computed, as the item before it is in another run."""

    def with_item(self, item: _Item) -> _Run:
        """The run with one more item before its first."""
        return _Run(
            self.rows + len(item.unit),
            self.all_tokens + sum(item.lengths),
            max(self.longest, *item.lengths),
            self.tokens + item.tokens - self.first_shared,
            item.shared,
        )

    def positions(self, rule: MicroBatching) -> int:
        if rule.packed or self.tokens < self.all_tokens:
            return rule.width(self.tokens)
        return self.rows * rule.width(self.longest)

    def fits(self, rule: MicroBatching) -> bool:
        if rule.tokens is None:
            return self.rows <= rule.rows
        return self.positions(rule) <= rule.tokens


def _runs(items: Sequence[_Item], rule: MicroBatching) -> list[list[int]]:
    """The rows of the fewest runs within the limit and, of those, of the fewest positions.

    The largest come first. `best[i]` is the best cut of the first i items: its runs, its positions,
    and where its last run starts.
    """
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for stop in range(1, len(items) + 1):
        run, options = _Run(), []
        for start in range(stop - 1, -1, -1):
            run = run.with_item(items[start])
            # A single item is within the limit, or has been refused.
            if start < stop - 1 and not run.fits(rule):
                break
            count, before, _ = best[start]
            options.append((count + 1, before + run.positions(rule), start))
        best.append(min(options))
    runs: list[tuple[int, list[int]]] = []
    stop = len(items)
    while stop:
        start = best[stop][2]
        rows = list(chain.from_iterable(item.unit for item in items[start:stop]))
        runs.append((best[stop][1] - best[start][1], rows))
        stop = start
    return [rows for _, rows in sorted(runs, key=_most_positions_first)]


def _most_positions_first(run: tuple[int, list[int]]) -> int:
    return -run[0]
