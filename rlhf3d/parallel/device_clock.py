"""When a GPU has come to a place in its work, on the clock of its host.

Invariant: taking a stamp makes nobody wait: an event goes into the stream behind the work before
it, and is read once the work is done. A time is off by what the GPU's clock drifts since the start.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Events of the current stream, measured from one at which host and device met."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._first = self.stamp()
        self._first.synchronize()
        self._began = time.monotonic_ns()

    def stamp(self) -> Any:
        """An event behind the work so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ns(self, stamp: Any) -> int:
        """When the device had come to it; waits until it has."""
        stamp.synchronize()
        return self._began + round(1e6 * self._first.elapsed_time(stamp))
