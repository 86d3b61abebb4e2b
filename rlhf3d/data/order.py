"""The order in which the rows of a set are served in an epoch.

Invariant: an order is a function of (rows, seed, epoch, curriculum) and serves each row at most
once; only a curriculum leaves rows out. It costs 8 bytes a row.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence

import numpy as np

PYTHON_ROWS = 1_000_000
"""Rows up to which Python's shuffle is used, which takes a second per million."""
LARGE_ORDER = "numpy.RandomState"
"""What shuffles more rows; part of a checkpoint, so that another order is never resumed."""

Difficulty = Callable[[int], float | None]
"""Of a row's number: low ones come first; null leaves the row out of this epoch."""


def make_order(
    rows: range, key: str, shuffle: bool, difficulty: Difficulty | None = None
) -> Sequence[int]:
    """The rows' numbers as served under `key` (seed and epoch)."""
    order = _shuffled(rows, key) if shuffle else rows
    return order if difficulty is None else _sorted(order, difficulty)


def _shuffled(rows: range, key: str) -> Sequence[int]:
    if len(rows) <= PYTHON_ROWS:
        numbers = array("q", rows)
        # Seeded by text, which Python hashes by SHA-512: the same in every process.
        random.Random(key).shuffle(numbers)
        return numbers
    # RandomState and not the newer Generator: its stream is the same in every version of numpy.
    seed = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype=np.uint32)
    # RandomState takes an array of 32-bit words as its seed: all 256 bits count.
    order = np.random.RandomState(seed).permutation(len(rows))
    # Positions to the rows' numbers, in the 8 bytes each that "q" holds.
    return array("q", (order + rows.start).astype(np.int64).tobytes())


def _sorted(order: Sequence[int], difficulty: Difficulty) -> Sequence[int]:
    served, keys = array("q"), array("d")
    for row in order:
        value = difficulty(row)
        if value is not None:
            served.append(row)
            keys.append(value)
    places = sorted(range(len(served)), key=keys.__getitem__)  # stable: equal rows stay shuffled
    return array("q", (served[place] for place in places))
