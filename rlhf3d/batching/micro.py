"""How the rows of each data-parallel rank are cut into micro-batches: by number, or by a budget of token positions.

Invariant: every row stands in exactly one micro-batch, all ranks get the same number of micro-batches, and with a
budget none has more positions than it. Where a rank lacks rows, micro-batches are empty: the engine runs a
filler of one masked token for them. Pure: row numbers and token counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlhf3d.batching.balance import split_rows
from rlhf3d.units import round_up


@dataclass(frozen=True)
class MicroBatching:
    """The rule for one model's micro-batches.

    Positions of a micro-batch are what the model computes: rows x longest row when padded, the sum of the rows when
    packed, rounded up to `multiple_of` (a padded row each, a packed micro-batch as a whole, whose rows each are rounded
    up to `row_multiple_of`).
    """

    rows: int
    """At most so many rows, where `tokens` gives no budget."""
    tokens: int | None = None
    """At most so many positions."""
    packed: bool = False
    """Rows stand one after the other instead of being padded to the longest."""
    multiple_of: int = 1
    """Widths are multiples of this: ranks that share out the sequence."""
    row_multiple_of: int = 1
    """Packed rows are multiples of this: the chunks of context parallelism; it divides `multiple_of`."""

    def width(self, tokens: int) -> int:
        """Positions of a padded row, or of a packed micro-batch."""
        return round_up(max(tokens, 1), self.multiple_of)

    def packed_row(self, tokens: int) -> int:
        """Positions of a row among others in a packed micro-batch."""
        return round_up(tokens, self.row_multiple_of)

    def positions(self, lengths: Sequence[int]) -> int:
        """Positions of a micro-batch of rows with these lengths; of a filler where there is none."""
        if self.packed or not lengths:
            return self.width(sum(map(self.packed_row, lengths)))
        return len(lengths) * self.width(max(lengths))


@dataclass(frozen=True)
class UpdatePlan:
    """How one model's update of a step is cut: epochs > mini-batches (optimizer steps) > micro-batches."""

    mini_batch_size: int
    """Prompts an optimizer step."""
    mini_batches: int
    """Mini-batches an epoch."""
    sequences_per_mini_batch: int
    """Sequences an optimizer step, over all data-parallel ranks."""
    sequences_per_rank: int
    """Sequences an optimizer step on one data-parallel rank; with a token budget, on average."""
    micro_batching: MicroBatching
    """How they are cut into forward/backward passes, on each data-parallel rank."""
    micro_batches_per_rank: int | None
    """Passes of one data-parallel rank an optimizer step (gradient accumulation); None where a budget decides."""
    epochs: int
    """Passes over the batch a training step."""
    optimizer_steps_per_step: int
    """Optimizer steps a training step."""


def plan_micro_batches(
    lengths: Sequence[int],
    rows_of: Sequence[Sequence[int]],
    rule: MicroBatching,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Micro-batches of each rank, whose rows (indices into `lengths`) are `rows_of[rank]`; as many on every rank.

    Their number is the smallest multiple of `multiple_of` (interleaved 1F1B wants one of the pipeline size) that
    suffices on every rank. The biggest come first, so that one too big for memory fails at once. Raises ValueError
    when a single row is over the budget.
    """
    _check_budget(lengths, rule)
    if rule.packed:
        lengths = [rule.packed_row(length) for length in lengths]
    needed = max(len(_fewest(lengths, rows, rule)) for rows in rows_of)
    count = round_up(max(needed, 1), multiple_of)
    return [_exactly(lengths, rows, rule, count) for rows in rows_of]


def _check_budget(lengths: Sequence[int], rule: MicroBatching) -> None:
    longest = max(lengths, default=0)
    if rule.tokens is not None and rule.width(longest) > rule.tokens:
        rounded = (
            f" (rounded up to a multiple of {rule.multiple_of})"
            if rule.width(longest) != longest
            else ""
        )
        raise ValueError(
            f"ppo_max_token_len_per_gpu = {rule.tokens}: a sequence of {longest} tokens takes {rule.width(longest)} "
            f"positions{rounded}; set at least {rule.width(longest)}"
        )


def _descending(lengths: Sequence[int], rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))


def _fewest(lengths: Sequence[int], rows: Sequence[int], rule: MicroBatching) -> list[list[int]]:
    """The fewest micro-batches that the rule allows (packed with a budget: as few as first fit finds)."""
    if rule.tokens is None:
        return _even_runs(_descending(lengths, rows), -(-len(rows) // rule.rows))
    if rule.packed:
        return _first_fit(lengths, rows, rule.tokens // rule.multiple_of * rule.multiple_of)
    return _padded_runs(lengths, rows, rule)


def _exactly(
    lengths: Sequence[int], rows: Sequence[int], rule: MicroBatching, count: int
) -> list[list[int]]:
    """`count` micro-batches, biggest first; `count` is at least what `_fewest` needs."""
    if rule.packed:
        batches = _even_parts(lengths, rows, rule, count)
    elif rule.tokens is None:
        batches = _even_runs(_descending(lengths, rows), count)
    else:
        batches = _split_up(lengths, _padded_runs(lengths, rows, rule), rule, count)
    return sorted(
        batches, key=lambda batch: -rule.positions([lengths[row] for row in batch]) if batch else 0
    )


def _even_runs(order: list[int], count: int) -> list[list[int]]:
    """`order` cut into `count` runs whose sizes differ by at most one."""
    bounds = [len(order) * i // count for i in range(count + 1)] if count else [0]
    return [order[a:b] for a, b in pairwise(bounds)]


def _even_parts(
    lengths: Sequence[int], rows: Sequence[int], rule: MicroBatching, count: int
) -> list[list[int]]:
    """`count` packed micro-batches of about as many tokens each; first fit's, split up, where even ones break the
    budget."""
    parts = split_rows([lengths[row] for row in rows], count, equal_counts=rule.tokens is None)
    batches = [[rows[i] for i in part] for part in parts]
    if rule.tokens is None or all(
        rule.positions([lengths[r] for r in b]) <= rule.tokens for b in batches
    ):
        return batches
    return _split_up(lengths, _fewest(lengths, rows, rule), rule, count)


def _first_fit(lengths: Sequence[int], rows: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each row into the first micro-batch that has room: at most 11/9 of the fewest, and 1."""
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
    """The fewest padded micro-batches within the budget and, of those, the ones with fewest positions.

    Rows of like length belong together, so these are runs of the rows from longest to shortest; best[i] is the best
    cut of the first i rows, as (micro-batches, positions, where the last one starts).
    """
    assert rule.tokens is not None
    order = _descending(lengths, rows)
    widths = [rule.width(lengths[row]) for row in order]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for stop in range(1, len(order) + 1):
        options = []
        for start in range(stop - 1, -1, -1):
            positions = (stop - start) * widths[start]
            if positions > rule.tokens:
                break
            options.append((best[start][0] + 1, best[start][1] + positions, start))
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
    """The same rows in exactly `count` micro-batches: the biggest that can be split is, until there are enough."""
    batches = [_descending(lengths, batch) for batch in batches]
    while len(batches) < count:
        big = max(
            (i for i, batch in enumerate(batches) if len(batch) > 1),
            key=lambda i: rule.positions([lengths[row] for row in batches[i]]),
            default=None,
        )
        if big is None:
            batches.append([])
            continue
        whole = batches.pop(big)
        batches += (
            [whole[::2], whole[1::2]]
            if rule.packed
            else [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        )
    return batches
