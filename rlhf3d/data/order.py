"""In which order the rows of a set are served in an epoch.

Invariant: an order is a function of (rows, seed, epoch, curriculum) and serves each row at most once; only a curriculum
leaves rows out. Memory does not grow with the rows beyond `LISTED` of them, but for a curriculum's one number a row.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

LISTED = 1_000_000
"""Up to so many rows an order is a shuffled list, beyond it a keyed permutation."""
_ROUNDS = 6

Difficulty = Callable[[int], float | None]
"""Of a row's number: rows are served from the lowest to the highest; null leaves the row out of this epoch."""


def make_order(
    rows: range, key: str, shuffle: bool, difficulty: Difficulty | None = None
) -> Sequence[int]:
    """The rows' numbers as served under `key` (seed and epoch)."""
    order: Sequence[int]
    if not shuffle:
        order = rows
    elif len(rows) <= LISTED:
        listed = list(rows)
        random.Random(key).shuffle(listed)
        order = listed
    else:
        order = KeyedPermutation(rows, key)
    return order if difficulty is None else _sorted(order, difficulty)


def _sorted(order: Sequence[int], difficulty: Difficulty) -> Sequence[int]:
    kept, keys = array("q"), array("d")
    for row in order:
        if (value := difficulty(row)) is not None:
            kept.append(row)
            keys.append(value)
    places = sorted(range(len(kept)), key=keys.__getitem__)  # stable: equal rows stay shuffled
    return array("q", (kept[place] for place in places))


class KeyedPermutation(Sequence[int]):
    """A pseudo-random permutation of `rows` that computes each place when it is asked: a Feistel network over the
    next power of four, walked until it lands inside."""

    def __init__(self, rows: range, key: str) -> None:
        self._rows = rows
        self._half = max(1, ((len(rows) - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._key = hashlib.blake2b(key.encode(), digest_size=32).digest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self._rows):
            raise IndexError(place)
        value: int = self._permute(place)
        while value >= len(self._rows):
            value = self._permute(value)
        return self._rows[value]

    def _permute(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for number in range(_ROUNDS):
            left, right = right, left ^ self._scramble(number, right)
        return left << self._half | right

    def _scramble(self, number: int, half: int) -> int:
        message = number.to_bytes(1, "little") + half.to_bytes(8, "little")
        digest = hashlib.blake2b(message, key=self._key, digest_size=8).digest()
        return int.from_bytes(digest, "little") & self._mask
