"""How the rows of each data-parallel rank are cut into micro-batches: by number, or by a budget.

Invariant: every row is in exactly one micro-batch, all ranks get the same number of micro-batches,
and with a budget of token positions none has more. Where a rank lacks rows, micro-batches are
empty: the engine runs a filler of one masked token for them.
Pure: row numbers and token counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlhf3d.batching.balance import split_rows
from rlhf3d.units import ceil_div, round_up


@dataclass(frozen=True)
class MicroBatching:
    """The rule for one model's micro-batches.

    Positions of a micro-batch are what the model computes: rows x longest row when padded, the sum
    of the rows when packed. They are rounded up to `multiple_of`: when padded each row, when packed
    the sum of the rows, which each are rounded up to `row_multiple_of`.
    """

    rows: int
    """Rows of a micro-batch at most, where `tokens` gives no budget."""
    tokens: int | None = None
    """Positions of a micro-batch at most."""
    packed: bool = False
    """Rows follow each other instead of being padded to the longest."""
    multiple_of: int = 1
    """Widths are multiples of this: ranks that share out the sequence."""
    row_multiple_of: int = 1
    """Packed rows are multiples of this: chunks of context parallelism. Divides `multiple_of`."""
    share_prefixes: bool = False
    """Rows that begin with the same tokens have them once (`prefixes`); such a micro-batch is
    packed. Others are as the fields above say."""

    def width(self, tokens: int) -> int:
        """Return the positions of a padded row, or of a packed micro-batch."""
        # An empty micro-batch runs as a filler of one token.
        return round_up(max(tokens, 1), self.multiple_of)

    def packed_row(self, tokens: int) -> int:
        """Return the positions of a row among others in a packed micro-batch."""
        return round_up(tokens, self.row_multiple_of)

    def positions(self, lengths: Sequence[int]) -> int:
        """Return the positions of a micro-batch of rows with these lengths; of none: a filler's."""
        if self.packed or not lengths:
            return self.width(sum(map(self.packed_row, lengths)))
        return len(lengths) * self.width(max(lengths))


@dataclass(frozen=True)
class UpdatePlan:
    """How one model's update is cut: epochs > mini-batches (optimizer steps) > micro-batches."""

    mini_batches: int
    """Mini-batches per epoch."""
    sequences_per_mini_batch: int
    """Trajectories per optimizer step, over all data-parallel ranks."""
    micro_batching: MicroBatching
    """How its sequences are cut into forward/backward passes, on each data-parallel rank."""
    micro_batches_per_rank: int | None
    """Passes per optimizer step on one data-parallel rank; None where a budget decides."""
    epochs: int
    """Passes over the batch per training step."""

    @property
    def optimizer_steps_per_step(self) -> int:
        """Optimizer steps per training step."""
        return self.mini_batches * self.epochs


def plan_micro_batches(
    lengths: Sequence[int],
    rows_of: Sequence[Sequence[int]],
    rule: MicroBatching,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Return the micro-batches of each rank, equally many on every rank.

    `rows_of[rank]` are a rank's rows, as indices into `lengths`. The number of micro-batches is the
    smallest multiple of `multiple_of` that suffices on every rank (interleaved 1F1B needs a
    multiple of the pipeline size). The largest come first, so that one too large for memory fails
    at once. Raises ValueError when a single row is over the budget.
    """
    check_budget(lengths, rule)
    if rule.packed:
        # Rows count with their own padding from here on; rounding them again changes nothing.
        lengths = [rule.packed_row(length) for length in lengths]
    fewest = [_fewest(lengths, rows, rule) for rows in rows_of]
    # The rank that needs the most decides for all.
    count = round_up(max([1, *map(len, fewest)]), multiple_of)
    parts = zip(rows_of, fewest, strict=True)
    return [_exactly(lengths, rows, found, rule, count) for rows, found in parts]


def check_budget(lengths: Sequence[int], rule: MicroBatching) -> None:
    """Raise ValueError when the longest row is over the budget."""
    longest = max(lengths, default=0)
    width = rule.width(longest)
    if rule.tokens is None or width <= rule.tokens:
        return
    rounded = f" (rounded up to a multiple of {rule.multiple_of})" if width != longest else ""
    raise ValueError(
        f"ppo_max_token_len_per_gpu = {rule.tokens}: a sequence of {longest} tokens takes {width} "
        f"positions{rounded}; set at least {width}"
    )


def _positions(lengths: Sequence[int], rows: Sequence[int], rule: MicroBatching) -> int:
    """Positions of a micro-batch of these rows."""
    return rule.positions([lengths[row] for row in rows])


def _descending(lengths: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Rows from the longest to the shortest."""

    def longest_first(row: int) -> tuple[int, int]:
        return -lengths[row], row

    return sorted(rows, key=longest_first)


def _fewest(lengths: Sequence[int], rows: Sequence[int], rule: MicroBatching) -> list[list[int]]:
    """The fewest micro-batches that the rule allows; packed with a budget, what first fit finds."""
    if rule.tokens is None:
        return _even_runs(_descending(lengths, rows), ceil_div(len(rows), rule.rows))
    if rule.packed:
        # The sum of the rows is rounded up afterwards, which must not take it over the budget.
        return _first_fit(lengths, rows, rule.tokens // rule.multiple_of * rule.multiple_of)
    return _padded_runs(lengths, rows, rule)


def _exactly(
    lengths: Sequence[int],
    rows: Sequence[int],
    fewest: list[list[int]],
    rule: MicroBatching,
    count: int,
) -> list[list[int]]:
    """`count` micro-batches, the largest first; at least as many as the `fewest` of the rows."""
    if rule.packed:
        batches = _even_parts(lengths, rows, fewest, rule, count)
    elif rule.tokens is None:
        batches = _even_runs(_descending(lengths, rows), count)
    else:
        batches = _split_up(lengths, fewest, rule, count)

    def largest_first(batch: list[int]) -> int:
        # A filler has positions too, but empty micro-batches belong behind those with rows.
        return -_positions(lengths, batch, rule) if batch else 0

    return sorted(batches, key=largest_first)


def _even_runs(order: list[int], count: int) -> list[list[int]]:
    """`order` cut into `count` runs whose sizes differ by at most one."""
    # A rank without rows needs no runs: count is 0.
    bounds = [len(order) * i // count for i in range(count + 1)] if count else [0]
    return [order[start:stop] for start, stop in pairwise(bounds)]


def _even_parts(
    lengths: Sequence[int],
    rows: Sequence[int],
    fewest: list[list[int]],
    rule: MicroBatching,
    count: int,
) -> list[list[int]]:
    """`count` packed micro-batches of about equally many tokens.

    Where even ones break the budget: the `fewest`, split up.
    """
    costs = [lengths[row] for row in rows]
    batches = []
    for part in split_rows(costs, count, equal_counts=rule.tokens is None):
        batches.append([rows[i] for i in part])
    if rule.tokens is None:
        return batches
    if max(_positions(lengths, batch, rule) for batch in batches) <= rule.tokens:
        return batches
    return _split_up(lengths, fewest, rule, count)


def _first_fit(lengths: Sequence[int], rows: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each row goes into the first micro-batch with room for it.

    They number at most 11/9 of the fewest, plus 1 (first-fit decreasing).
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for row in _descending(lengths, rows):
        fitting = next((i for i, left in enumerate(room) if lengths[row] <= left), None)
        if fitting is None:
            fitting = len(batches)
            batches.append([])
            room.append(capacity)
        batches[fitting].append(row)
        room[fitting] -= lengths[row]
    return batches


def _padded_runs(
    lengths: Sequence[int], rows: Sequence[int], rule: MicroBatching
) -> list[list[int]]:
    """The fewest padded micro-batches within the budget and, of those, those of fewest positions.

    Rows of similar length belong together, so micro-batches are runs of the rows from longest to
    shortest. `best[i]` is the best cut of the first i rows: its micro-batches, its positions, and
    where its last micro-batch starts.
    """
    assert rule.tokens is not None
    order = _descending(lengths, rows)
    widths = [rule.width(lengths[row]) for row in order]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for stop in range(1, len(order) + 1):
        options = []
        for start in range(stop - 1, -1, -1):
            # In descending order the first row of a run is its longest.
            positions = (stop - start) * widths[start]
            if positions > rule.tokens:
                break  # an earlier start has more rows, none of them shorter
            count, before, _ = best[start]
            options.append((count + 1, before + positions, start))
        # Tuples compare by micro-batches, then by positions. There is an option: a run of one row
        # is within the budget, which check_budget has made sure of.
        best.append(min(options))
    batches, stop = [], len(order)
    while stop:
        start = best[stop][2]
        batches.append(order[start:stop])
        stop = start
    return batches[::-1]


def _split_up(
    lengths: Sequence[int], batches: list[list[int]], rule: MicroBatching, count: int
) -> list[list[int]]:
    """The same rows in exactly `count` micro-batches.

    The largest that can be split is, until there are enough; then empty ones are added.
    """
    batches = [_descending(lengths, batch) for batch in batches]
    while len(batches) < count:
        splittable = [i for i, batch in enumerate(batches) if len(batch) > 1]
        if not splittable:
            batches.append([])
            continue
        sizes = {i: _positions(lengths, batches[i], rule) for i in splittable}
        rows = batches.pop(max(splittable, key=sizes.__getitem__))
        if rule.packed:
            # Alternate rows: both halves get about as many tokens.
            batches += [rows[::2], rows[1::2]]
        else:
            # Neighbors in length stay together: the second half gets narrower.
            half = len(rows) // 2
            batches += [rows[:half], rows[half:]]
    return batches
