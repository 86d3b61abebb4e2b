"""Desks: two askers with the same numbers, one pair of engines."""

from __future__ import annotations

from support.experience import FakeEngine

from rlhf3d.rollout.api import Request, SamplingSettings
from rlhf3d.rollout.desk import Desks


def request(first: int, affinity: int | None = None) -> Request:
    return Request((first,), 0, SamplingSettings(max_tokens=4), affinity)


def test_each_gets_its_own_whoever_waits() -> None:
    engine = FakeEngine()
    desks = Desks(engine)
    one, other = desks.open(), desks.open()
    one.submit({0: request(1)})
    other.submit({0: request(2), 1: request(3)})
    found: set[int] = set()
    while found != {0}:
        found |= one.poll(1.0).keys()
    taken: set[int] = set()
    while len(taken) < 2:
        taken |= other.poll(1.0).keys()
    assert taken == {0, 1} and not engine.unfinished
    assert one.poll(0.0) == {} == other.poll(0.0)


def test_one_look_serves_all() -> None:
    engine = FakeEngine()
    desks = Desks(engine)
    several = [desks.open() for _ in range(3)]
    for desk in several:
        desk.submit({0: request(1)})
    with desks.fetched(1.0):
        left = engine.unfinished
        taken = [len(desk.poll(1.0)) for desk in several]
        assert sum(taken) == 3 - left and engine.unfinished == left, "the engine was not asked"
    assert left > 0, "there was more to take"
    for desk in several * 2:  # what one fetches may be another's
        taken.append(len(desk.poll(1.0)))
    assert sum(taken) == 3


def test_an_abort_is_of_ones_own() -> None:
    engine = FakeEngine()
    desks = Desks(engine)
    one, other = desks.open(), desks.open()
    one.submit({0: request(1)})
    other.submit({0: request(2)})
    one.abort([0, 5])
    assert engine.unfinished == 1
    assert other.poll(1.0).keys() == {0} and one.poll(0.0) == {}


def test_trajectories_of_two_desks_are_two() -> None:
    engine = FakeEngine()
    desks = Desks(engine)
    for _ in range(2):
        desks.open().submit({0: request(1, affinity=7)})
    first, second = engine.requests
    assert first.affinity != second.affinity and None not in (first.affinity, second.affinity)
