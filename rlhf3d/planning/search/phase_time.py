"""What the time models of all phases share.

Invariant: a phase's seconds are the sum of named parts. Pure: numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase, by what takes them."""

    phase: str
    parts: Mapping[str, float]
    longest_s: float = 0.0
    """Of `generate` in flight, where a batch has no end of its own: of its longest trajectory."""

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.parts.values())


def ring_bytes(ranks: int, size: float) -> float:
    """Bytes that each rank sends in a ring all-reduce of `size` bytes."""
    # A reduce-scatter and an all-gather, of (n - 1) / n of the bytes each.
    return 2 * (ranks - 1) / ranks * size
