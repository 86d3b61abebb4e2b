"""Several askers at the same engines, each with numbers of its own.

Invariant: a completion reaches the asker that submitted its request, whoever waits for the engines
when it comes. Pure: no vLLM, no Ray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from rlhf3d.rollout.api import Completion, Engines, Request


class _Place(NamedTuple):
    """Where the answer to a request belongs."""

    desk: Desk
    number: int
    """The asker's."""


class Desks:
    """The desks at some engines; all that is asked of these goes through them."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self._numbers, self._desks = count(), count()
        self._places: dict[int, _Place] = {}
        """Of unfinished requests, by the number that engines know."""
        self._fetched = False
        """Whether what has finished is on the desks, and nobody need look."""

    def open(self) -> Desk:
        """A new desk, which knows nothing of the others."""
        return Desk(self, next(self._desks))

    def fetch(self, timeout_s: float) -> None:
        """Put what has finished on its desks; waits up to `timeout_s` for the first."""
        for own, completion in self.engines.poll(timeout_s).items():
            desk, number = self._places.pop(own)
            desk.finished[number] = completion

    @contextmanager
    def fetched(self, timeout_s: float) -> Iterator[None]:
        """As `fetch`, and nobody asks the engines again within the body: one look serves many."""
        self.fetch(timeout_s)
        self._fetched = True
        try:
            yield
        finally:
            self._fetched = False

    def look(self, timeout_s: float) -> None:
        """As `fetch`, unless that was done just now."""
        if not self._fetched:
            self.fetch(timeout_s)

    def submit(self, desk: Desk, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`, for a desk."""
        asked: dict[int, Request] = {}
        places: dict[int, _Place] = {}
        for number, request in requests.items():
            own = next(self._numbers)
            places[own], asked[own] = _Place(desk, number), _with_affinity(request, desk.number)
        self.engines.submit(asked)
        self._places |= places

    def abort(self, desk: Desk, numbers: Collection[int]) -> None:
        """See `Engines.abort`, for a desk."""
        given = [o for o, place in self._places.items() if place.desk is desk]
        given = [own for own in given if self._places[own].number in numbers]
        self.engines.abort(given)
        for own in given:
            del self._places[own]


class Desk:
    """One asker's way to the engines: an `Engines` with numbers of its own."""

    def __init__(self, desks: Desks, number: int) -> None:
        self._desks, self.number = desks, number
        self.finished: dict[int, Completion] = {}
        """Completions that nobody has taken, by the asker's numbers."""

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`."""
        self._desks.submit(self, requests)

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """See `Engines.poll`."""
        if not self.finished:
            self._desks.look(timeout_s)
        finished, self.finished = self.finished, {}
        return finished

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""
        self._desks.abort(self, numbers)
        for number in numbers:
            self.finished.pop(number, None)


def _with_affinity(request: Request, desk: int) -> Request:
    """Trajectories of two desks may have the same number: engines must tell them apart."""
    if request.affinity is None:
        return request
    return replace(request, affinity=desk << 32 | request.affinity)
