"""What engines were given since they got their weights, for engines that are started again.

Invariant: given again what `again` says, an engine takes the same steps with the same requests as
the one that died, and has the same prefixes in its cache: the numbers are the same. That holds for
collections whose requests came at once, since when the weights are the same; where requests came
while others ran, or weights did, the steps depended on the time, and only what is unanswered is
given again.
Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rlhf3d.rollout.api import Request


@dataclass
class _Given:
    """What an engine was given from one moment without requests to the next."""

    requests: dict[int, Request]
    at_once: bool = True


class Ledger:
    """The requests of each engine."""

    def __init__(self, engines: int) -> None:
        self._given: list[list[_Given]] = [[] for _ in range(engines)]

    def add(self, engine: int, requests: Mapping[int, Request], idle: bool) -> None:
        """An engine was given requests; `idle`: it had none before."""
        given = self._given[engine]
        if idle:
            given.append(_Given(dict(requests)))
        else:
            given[-1].requests |= requests
            given[-1].at_once = False

    def drop(self, engine: int, numbers: Iterable[int]) -> None:
        """Some of an engine's requests were aborted, at a step that nobody knows."""
        given = self._given[engine][-1]
        given.at_once = False
        for number in numbers:
            given.requests.pop(number, None)

    def again(self, engine: int, unfinished: Collection[int]) -> list[dict[int, Request]]:
        """What to give an engine again: one dict after the other, each when it is done with the
        one before; `unfinished` are the requests that nobody has an answer to.
        """
        again = []
        for given in self._given[engine]:
            requests = given.requests
            if not given.at_once:
                requests = {n: request for n, request in requests.items() if n in unfinished}
            if requests:
                again.append(requests)
        return again

    def turn_page(self, unfinished: Collection[int]) -> None:
        """The engines have got other weights, and begin without prefixes.

        `unfinished`: the requests that nobody has an answer to, which go on under these weights.
        """
        for given in self._given:
            left: dict[int, Request] = {}
            for part in given:
                left |= {n: request for n, request in part.requests.items() if n in unfinished}
            given.clear()
            if left:
                given.append(_Given(left, at_once=False))
