"""Weights that come while requests run, and engines that are started again then.

Each request is answered once, and none that was answered is done again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from support.local_engines import LocalEngines

from rlhf3d.placement.waiting import WorkerFailure, gather
from rlhf3d.rollout.api import Completion, Request, SamplingSettings

ENGINES = 2
WAIT_S = 20.0
DYING: set[int] = set()
"""Engines whose next step fails."""
STEPPED: set[int] = set()
"""Engines that have begun one."""


class StandIn:
    """A token a step for each request, by the version that is published then."""

    def __init__(self, log: list[Any], engine: int) -> None:
        self.log, self.engine = log, engine
        self.version: int | None = None
        self.left: dict[int, int] = {}
        self.versions: dict[int, list[int]] = {}
        log.append(("start", engine))

    @property
    def unfinished(self) -> bool:
        return bool(self.left)

    @property
    def can_step(self) -> bool:
        return self.unfinished and self.version is not None

    def agree(self, number: int, timeout_s: float) -> int:
        return number

    def update_weights(self, policy_version: int, sync: int) -> None:
        self.version = None

    def publish(self, policy_version: int) -> None:
        self.version = policy_version

    def submit(self, requests: Mapping[int, Request]) -> None:
        self.log.append(("submit", self.engine, *requests))
        self.left |= {number: one.sampling.max_tokens for number, one in requests.items()}
        self.versions |= {number: [] for number in requests}

    def abort(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self.left.pop(number, None)

    def step(self) -> dict[int, Completion]:
        STEPPED.add(self.engine)
        time.sleep(0.02)
        if self.engine in DYING:
            DYING.remove(self.engine)
            raise RuntimeError("it dies")
        assert self.version is not None
        for number in self.left:
            self.versions[number].append(self.version)
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if not left]
        self.abort(done)
        return {number: completion(self.versions[number]) for number in done}

    def close(self) -> None:
        """As vLLM's."""


def completion(written: list[int]) -> Completion:
    """Its tokens are the versions that wrote them."""
    firsts = {version: written.index(version) for version in written}
    versions = tuple((first, version) for version, first in firsts.items())
    return Completion(written, (0.0,) * len(written), "length", versions)


def request(tokens: int) -> Request:
    return Request((1, 2), 0, SamplingSettings(max_tokens=tokens))


@pytest.fixture
def log() -> list[Any]:
    """Starts of engines, and what each was given."""
    return []


@pytest.fixture
def group(log: list[Any]) -> Iterator[LocalEngines]:
    DYING.clear()
    STEPPED.clear()
    with pytest.MonkeyPatch.context() as patch:
        make = partial(StandIn, log)
        engines = LocalEngines(make, ENGINES, patch, update="in_flight")
        engines.publish(0)
        yield engines
        engines.close()


def update(group: LocalEngines, version: int) -> None:
    calls = group.start_update_weights(version, 0)
    gather("update", calls, WAIT_S)
    with pytest.raises(RuntimeError, match="no policy is published"):
        group.submit({99: request(1)})
    assert group.poll(0.1) == {}, "all wait"
    group.publish(version)


def all_of(group: LocalEngines, count: int) -> dict[int, Completion]:
    made: dict[int, Completion] = {}
    while len(made) < count:
        part = group.poll(WAIT_S)
        assert part and not made.keys() & part.keys()
        made |= part
    return made


def test_requests_go_on_under_new_weights(group: LocalEngines) -> None:
    group.submit({number: request(50) for number in range(4)})
    until = time.monotonic() + WAIT_S
    while len(STEPPED) < ENGINES and time.monotonic() < until:
        assert group.poll(0.01) == {}
    update(group, 1)
    group.submit({4: request(50)})
    update(group, 2)
    made = all_of(group, 5)
    for number in range(4):
        assert [version for _, version in made[number].versions] == [0, 1, 2]
        assert len(made[number].token_ids) == 50
    assert made[4].oldest_version >= 1
    assert group.poll(0.1) == {}


@pytest.mark.parametrize("again", [False, True])
def test_engines_that_are_started_again_get_what_is_unanswered(
    group: LocalEngines, log: list[Any], again: bool
) -> None:
    """`again`: with the weights that they had; else it happened at a sync, or weights are newer."""
    group.submit({0: request(2), 1: request(2), 2: request(60), 3: request(60)})
    made = all_of(group, 2)
    assert sorted(made) == [0, 1]
    update(group, 1)
    group.submit({number: request(40) for number in range(4, 8)})
    DYING.add(1)
    with pytest.raises(WorkerFailure, match="it dies"):
        all_of(group, 9)
    del log[:]
    group.restart()
    version = 1 if again else 2
    gather("update", group.start_update_weights(version, 0), WAIT_S)
    group.publish(version, again)
    rest = all_of(group, 6)
    assert sorted(rest) == [2, 3, 4, 5, 6, 7]
    assert {one.versions for one in rest.values()} == {((0, version),)}
    given = [what for what in log if what[0] == "submit"]
    assert sorted(number for what in given for number in what[2:]) == [2, 3, 4, 5, 6, 7]
    # Engines are not at what was answered: the next weights come while a request runs.
    group.submit({0: request(60)})
    update(group, 3)
    assert all_of(group, 1)[0].newest_version == 3


def test_weights_that_come_in_vain_are_followed_by_those_that_come_again(
    group: LocalEngines,
) -> None:
    """An engine is lost at a sync: both are started again, and no request is lost."""
    group.submit({0: request(60), 1: request(60)})
    gather("update", group.start_update_weights(1, 0), WAIT_S)
    group.restart()
    update(group, 1)
    made = all_of(group, 2)
    assert {one.versions for one in made.values()} == {((0, 1),)}
