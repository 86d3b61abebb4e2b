"""Rows that begin with the same tokens, as a tree: what they have in common once, then the rest.

Invariant: a position of two rows is one position of the tree only where all of their tokens up to
it are the same, so a causal model computes the same there for both; every other has its own.
Pure: token numbers. What a row's tokens are for (prompt, response, mask) does not enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

TOKEN: np.dtype[np.int32] = np.dtype(">i4")
"""With the most significant byte first, strings of tokens sort as the tokens do."""


@dataclass(frozen=True)
class SortedRows:
    """Rows in the order of their tokens: those that begin with the same ones are neighbors."""

    order: list[int]
    """Numbers of the rows."""
    shared: list[int]
    """Of each in that order: leading tokens that it has in common with the one before it."""


@dataclass(frozen=True)
class Segment:
    """Tokens that some rows have in common, in all rows' line of segments.

    Segments with tokens that follow it in the rows come right behind it in the line.
    """

    rows: tuple[int, ...]
    """The rows that have it."""
    start: int
    """Its first position in them."""
    stop: int
    """And behind its last."""
    column: int
    """Its first position in the line."""
    reach: int
    """Where the tokens that follow it in some row end in the line."""

    @property
    def end(self) -> int:
        """The position behind its last in the line."""
        return self.column + self.stop - self.start


def token_strings(input_ids: Tensor, lengths: Sequence[int]) -> list[bytes]:
    """Return the tokens of each row [N, S] as a string that sorts as they do."""
    table = input_ids.numpy().astype(TOKEN)
    return [table[row, :length].tobytes() for row, length in enumerate(lengths)]


def common_tokens(one: bytes, other: bytes) -> int:
    """Return the number of leading tokens that two rows have in common."""
    shorter = min(len(one), len(other)) // TOKEN.itemsize
    differ = np.frombuffer(one, TOKEN, shorter) != np.frombuffer(other, TOKEN, shorter)
    return int(differ.argmax()) if differ.any() else shorter


def sort_rows(rows: Sequence[int], strings: Sequence[bytes]) -> SortedRows:
    """Return `rows`, as indices into `strings`, in the order of their tokens."""
    # Sorting is stable: equal rows stay in their order.
    order = sorted(rows, key=strings.__getitem__)
    shared = [0] * len(order)
    for i in range(1, len(order)):
        shared[i] = common_tokens(strings[order[i - 1]], strings[order[i]])
    return SortedRows(order, shared)


def segments_of(found: SortedRows, lengths: Sequence[int]) -> list[Segment]:
    """Return the line of segments of all rows; `lengths` by the row's number."""
    order, shared = found.order, found.shared
    line: list[Segment] = []

    def place(first: int, last: int, start: int, column: int) -> int:
        """Append the tokens from `start` on of the rows first to last; return where they end."""
        stop = min([lengths[order[first]], *shared[first + 1 : last]])
        number = len(line)
        own = Segment(tuple(order[first:last]), start, stop, column, column)
        if stop > start:
            line.append(own)
            column += stop - start
        if last - first > 1:
            # Where rows have nothing more in common with the one before them.
            splits = [i for i in range(first + 1, last) if shared[i] == stop]
            for left, right in zip([first, *splits], [*splits, last], strict=True):
                column = place(left, right, stop, column)
        if stop > start:
            line[number] = Segment(own.rows, start, stop, own.column, column)
        return column

    # Rows that have no first token in common are trees of their own.
    roots = [i for i in range(len(order)) if shared[i] == 0]
    column = 0
    for left, right in zip(roots, [*roots[1:], len(order)], strict=True):
        column = place(left, right, 0, column)
    return line


def tree_tokens(found: SortedRows, lengths: Sequence[int]) -> int:
    """Return the tokens of all rows, those in common once."""
    return sum(lengths[row] for row in found.order) - sum(found.shared)
