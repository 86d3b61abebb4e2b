"""One clock for processes of several machines.

Invariant: processes of one machine share its monotonic clock, so theirs need no correction; another
machine's is known to within half a round trip, and the error is kept beside it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Clock(Protocol):
    """Takes stamps at once and turns them into times later."""

    def stamp(self) -> Any:
        """Of now."""

    def ns(self, stamp: Any) -> int:
        """On the machine's monotonic clock."""


class HostClock:
    """The clock of the process."""

    def stamp(self) -> int:
        """Of now."""
        return time.monotonic_ns()

    def ns(self, stamp: int) -> int:
        """The stamp is the time."""
        return stamp


@dataclass(frozen=True)
class RoundTrip:
    """A question for the time: when it was sent, what was answered, when the answer came; ns."""

    sent: int
    answer: int
    came: int


@dataclass(frozen=True)
class Offset:
    """What to take from another machine's times to have ours."""

    ns: int
    error_ns: int
    """At most so far off."""


SAME = Offset(0, 0)


def offset_of(trips: Sequence[RoundTrip]) -> Offset:
    """The offset that the shortest round trip gives: the answer was made while it was under way."""
    best = min(trips, key=lambda trip: trip.came - trip.sent)
    middle = (best.sent + best.came) // 2
    return Offset(best.answer - middle, (best.came - best.sent + 1) // 2)


def this_machine() -> str:
    """A name that processes share whose monotonic clocks are one."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        # Without Linux's name: of the network card, or a random one for each process.
        return f"{uuid.getnode():x}"
