"""Engines behind one door, in Ray's processes, with a stand-in for vLLM.

Requests in and completions out as they finish; engines that raise, hang or die.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import ray

from rlhf3d.config.schema import ClusterConfig, RolloutConfig
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.placement import engine_rank, rollout_group
from rlhf3d.placement.cluster import ray_cluster, reserve
from rlhf3d.placement.engine_rank import EngineRank
from rlhf3d.placement.resources import place_engines
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.waiting import WorkerFailure
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, written_by
from rlhf3d.rollout.settings import EngineSettings

ENGINES = 2
RAISES, HANGS, DIES = 66, 77, 88
"""Prompts of one token that break an engine's step."""
HELD = 55
"""Begins a prompt whose completion goes on with the next publication and not before."""
PHASE_S = 3.0
"""In the tests of deadlines; others leave a slow machine its time."""


class StandIn:
    """A token a step for each request; it says in a completion who wrote it, and with whom."""

    def __init__(self, settings: EngineSettings, threads: int, rank: int) -> None:
        self.left: dict[int, int] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.held: set[int] = set()

    def start(self, meeting: Any, host: str) -> StandIn:
        return self

    def agree(self, number: int, timeout_s: float) -> int:
        return number

    @property
    def unfinished(self) -> bool:
        return bool(self.left)

    can_step = unfinished

    def publish(self, policy_version: int) -> None:
        """As vLLM's."""
        self.held = set()

    def submit(self, requests: Mapping[int, Request]) -> None:
        self.left |= {number: one.sampling.max_tokens for number, one in requests.items()}
        self.prompts |= {number: tuple(one.prompt_ids) for number, one in requests.items()}
        self.held |= {number for number in requests if self.prompts[number][0] == HELD}

    def abort(self, numbers: Collection[int]) -> None:
        for number in numbers:
            self.left.pop(number, None)
            self.held.discard(number)

    def step(self) -> dict[int, Completion]:
        time.sleep(0.01)
        begins = {self.prompts[number][0] for number in self.left}
        if RAISES in begins:
            raise KeyError("the cause")
        if HANGS in begins:
            time.sleep(3600)
        if DIES in begins:
            os._exit(3)
        together = len(self.left)
        for number in self.left.keys() - self.held:
            self.left[number] -= 1
        done = [number for number, left in self.left.items() if not left]
        self.abort(done)
        return {
            n: Completion((os.getpid(), together), (0.0, 0.0), "stop", written_by(0)) for n in done
        }


class Rank(EngineRank):
    """Around the stand-in."""

    def __init__(self, *args: Any) -> None:
        engine_rank.VLLMEngine = StandIn  # type: ignore[misc, assignment]
        super().__init__(*args)


def request(tokens: int, *prompt: int) -> Request:
    return Request(prompt or (1, 2), 0, SamplingSettings(max_tokens=tokens))


@pytest.fixture(scope="module")
def group() -> Iterator[RolloutGroup]:
    """Two engines, serving policy 0."""
    placement = place_engines(CPUPlatform("test"), ENGINES, 1)
    assert placement.engine_bundles is not None
    rollout = RolloutConfig(dtype="float32", enforce_eager=True, engines=ENGINES)
    with (
        pytest.MonkeyPatch.context() as patch,
        ray_cluster(ClusterConfig(), placement.cpus),
        reserve(placement, 300) as reserved,
    ):
        patch.setattr(rollout_group, "EngineRank", Rank)
        engines = RolloutGroup(
            EngineSettings("", rollout, 64, CPUPlatform("test")),
            replace(ClusterConfig(), phase_timeout_s=60.0, startup_timeout_s=300.0),
            placement,
            reserved,
            placement.engine_bundles,
            [[1]] * ENGINES,
        )
        engines.wait_ready()
        with pytest.raises(RuntimeError, match="no policy is published"):
            engines.submit({0: request(1)})
        engines.publish(0)
        yield engines


def all_of(engines: RolloutGroup) -> dict[int, Completion]:
    made: dict[int, Completion] = {}
    while part := engines.poll(20.0):
        assert not made.keys() & part.keys()
        made |= part
    return made


def test_requests_are_dealt_come_back_as_they_finish_and_can_be_dropped(
    group: RolloutGroup,
) -> None:
    assert group.poll(20.0) == {}, "nothing is unfinished"
    with pytest.raises(ValueError, match="do not fit max_model_len=64"):
        group.submit({0: request(63)})
    group.submit({number: request(5 + number) for number in range(6)})
    made = all_of(group)
    writers = {number: made[number].token_ids[0] for number in range(6)}
    assert len(set(writers.values())) == ENGINES
    for number in range(6):
        assert writers[number] == writers[number % ENGINES]
    # The last one is alone by its end: they ran together, and none began late.
    assert [made[number].token_ids[1] for number in range(6)] == [3, 3, 2, 2, 1, 1]
    # A number that was given up is free at once; a short request overtakes a long one.
    group.submit({0: request(60, HELD), 1: request(60), 7: request(60, HELD)})
    group.abort([1, 99])
    group.submit({1: request(2)})
    first = group.poll(20.0)
    assert list(first) == [1] and first[1].token_ids[0] == writers[1]
    assert group.poll(0.01) == {}
    group.publish(0)
    assert sorted(all_of(group)) == [0, 7]


def test_an_engine_that_works_longer_than_a_phase_is_left_alone(
    group: RolloutGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is that of a step; so is a caller that has other things to do."""
    group.submit({0: request(60, HELD), 1: request(1)})
    assert list(group.poll(20.0)) == [1]
    time.sleep(PHASE_S + 1)
    group.publish(0)
    monkeypatch.setattr(group, "timeout_s", PHASE_S)
    assert list(group.poll(20.0)) == [0]


def test_engines_that_are_started_again_do_again_what_they_were_given(
    group: RolloutGroup,
) -> None:
    group.submit({number: request(3) for number in range(4)})
    assert len(all_of(group)) == 4
    pid = ray.get(group.engines[1].actors[0].process_id.remote())
    asked = {number: request(5 + 18 * number) for number in range(3)}
    group.submit(asked | {3: request(59, HELD)})
    answered = group.poll(20.0)
    os.kill(pid, 9)
    with pytest.raises(WorkerFailure, match=r"(?s)generate failed on engine 1:.*died"):
        while len(answered) < 4:
            answered |= group.poll(20.0)
    assert list(group.lost()) == ["engine 1"]
    group.restart()
    group.publish(0, again=True)
    group.publish(0)  # the engine that was started again holds its request too
    rest = all_of(group)
    # Where this process was slow, the other engine had ended more before the death.
    made = answered | rest
    assert sorted(made) == [0, 1, 2, 3] and not answered.keys() & rest.keys()
    assert 3 in rest and [made[number].token_ids[1] for number in (2, 3)] == [1, 1]
    assert group.lost() == {}


def test_a_step_that_raises_is_told_with_its_traceback(group: RolloutGroup) -> None:
    group.submit({0: request(50), 1: request(5, RAISES)})
    with pytest.raises(
        WorkerFailure, match=r"(?s)generate failed on engine 1:.*step.*KeyError: 'the cause'"
    ):
        all_of(group)
    assert group.lost() == {}, "its process lives"
    group.abort([0, 1])
    group.restart()
    group.publish(0)


def test_an_engine_that_takes_no_step_is_named(
    group: RolloutGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "timeout_s", PHASE_S)
    began = time.monotonic()
    group.submit({0: request(5, HANGS), 1: request(5), 2: request(5)})
    with pytest.raises(
        WorkerFailure, match=r"engine 0 has 2 unfinished requests and took no step within 3 s"
    ):
        all_of(group)
    assert PHASE_S <= time.monotonic() - began < 50
