"""Which rows go where: equal shares over data-parallel ranks, and micro-batches with little padding.

Invariant: every row is placed exactly once, and the same lengths give the same placement.
Pure: row numbers and token counts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def split_rows(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Rows of each part, ascending: the same count a part, total tokens as even as a greedy pass makes them.

    Rows are dealt out in rounds of `parts`, longest first, the longest of a round to the part with fewest
    tokens so far. The totals of two parts so never differ by more than longest minus shortest row: a round
    turns a difference d of two totals into |d - e|, where e is the opposed difference of the rows dealt.
    Raises ValueError when `parts` does not divide the number of rows.
    """
    if parts < 1 or len(lengths) % parts:
        raise ValueError(f"{len(lengths)} rows do not divide over {parts} parts: each needs the same count")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    placed: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for start in range(0, len(order), parts):
        lightest_first = sorted(range(parts), key=lambda part: (totals[part], part))
        for part, row in zip(lightest_first, order[start : start + parts], strict=True):
            placed[part].append(row)
            totals[part] += lengths[row]
    return [sorted(rows) for rows in placed]


def micro_batches(
    lengths: Sequence[int],
    rows: Sequence[int],
    micro_batch_size: int,
    multiple_of: int = 1,
    sort: bool = True,
) -> list[list[int]]:
    """Cut `rows` (indices into `lengths`) into the fewest micro-batches of at most `micro_batch_size` rows.

    With `sort` rows of like length share a micro-batch, longest first, so that one too big for memory fails
    at once; without it they stay in order. `multiple_of` must divide the number of micro-batches (interleaved
    1F1B wants a multiple of the pipeline size); sizes differ by at most one. Raises ValueError when there are too
    few rows for that many micro-batches.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro-batches of {micro_batch_size} rows: must be at least 1")
    count = -(-len(rows) // (micro_batch_size * multiple_of)) * multiple_of
    if count > len(rows):
        raise ValueError(
            f"{len(rows)} rows cannot fill {count} micro-batches (of at most {micro_batch_size} rows, "
            f"their number a multiple of {multiple_of})"
        )
    order = sorted(rows, key=lambda row: (-lengths[row], row)) if sort else list(rows)
    bounds = [len(order) * i // count for i in range(count + 1)] if count else [0]
    return [order[a:b] for a, b in pairwise(bounds)]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]], multiple_of: int = 1) -> float:
    """Share of token positions that are padding, in [0, 1), when each batch is as wide as its longest row.

    `multiple_of` rounds that width up (tensor-parallel size under sequence parallelism).
    """
    positions = sum(
        len(batch) * -(-max(lengths[row] for row in batch) // multiple_of) * multiple_of for batch in batches if batch
    )
    tokens = sum(lengths[row] for batch in batches for row in batch)
    return 1.0 - tokens / positions if positions else 0.0
