"""Offsets of other machines' clocks."""

from __future__ import annotations

import random

from rlhf3d.observability.profile.clock import Offset, RoundTrip, offset_of, this_machine


def test_the_quickest_answer_counts() -> None:
    slow = RoundTrip(sent=0, answer=5_900, came=1_000)
    quick = RoundTrip(sent=2_000, answer=7_020, came=2_041)
    assert offset_of([slow, quick]) == Offset(5_000, 21)


def test_the_error_holds_however_the_way_is_shared() -> None:
    """An answer made at any moment of its round trip gives an offset within the error."""
    rng = random.Random(0)
    for _ in range(200):
        true = rng.randrange(-(10**12), 10**12)
        trips = []
        for _ in range(8):
            sent, there, back = rng.randrange(10**9), rng.randrange(10**6), rng.randrange(10**6)
            trips.append(RoundTrip(sent, sent + there + true, sent + there + back))
        found = offset_of(trips)
        assert abs(found.ns - true) <= found.error_ns


def test_a_machine_keeps_its_name() -> None:
    assert this_machine() == this_machine() != ""
