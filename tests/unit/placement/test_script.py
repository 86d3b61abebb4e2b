"""Requests that come in any order, and what engines are then told: what the journal's run told."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from rlhf3d.placement.journal import Command, Made, Segment, asked, made
from rlhf3d.placement.script import Divergence, EndOfScript, Script
from rlhf3d.rollout.api import Completion, Request, SamplingSettings

TRAJECTORIES = tuple(f"b1.p{number // 2}.s{number % 2}" for number in range(8))
NAMES = tuple(f"{name}.t0.a0" for name in TRAJECTORIES)


def request(name: str, seed: int = 0, *prompt: int) -> Request:
    return Request(prompt or (1, 2, len(name)), seed, SamplingSettings(), name=name)


def submit(*names: str) -> Command:
    return Command("submit", requests=tuple(asked(request(name)) for name in names))


def segment() -> Segment:
    """Two engines; the first has an abort, and both get weights in the middle."""
    sync = [Command("update_weights", version=1), Command("publish", version=1)]
    first = [submit(NAMES[0], NAMES[2]), submit(NAMES[4]), *sync, submit(NAMES[6])]
    second = [submit(NAMES[3], NAMES[1]), *sync, submit(NAMES[5]), submit(NAMES[7])]
    first.insert(2, Command("abort", names=(NAMES[4],)))
    commands = {0: first, 1: second}
    schedules = {0: [0, 2, 4, 5, 5, 9], 1: [0, 3, 3, 3, 8]}
    return Segment(0, {}, commands, schedules, {}, {1: TRAJECTORIES[:3], 2: TRAJECTORIES[3:5]})


def told(script: Script, engine: int) -> list[list[str]]:
    """Names of what an engine is told now about requests; an abort's begin with a minus."""
    found = []
    while (given := script.next_of_requests(engine)) is not None:
        if isinstance(given, Mapping):
            found.append([one.name for one in given.values()])
        else:
            found.append([f"-{own}" for own in given])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_engines_are_told_the_same_whenever_requests_come(seed: int) -> None:
    """And the trainer's commands have their turn only when those before them were told."""
    script, chance = Script(segment()), random.Random(seed)
    coming = list(enumerate(NAMES))
    chance.shuffle(coming)
    order: dict[int, list[list[str]]] = {0: [], 1: []}
    events = [*coming, *["sync"] * 40]
    chance.shuffle(events)
    dropped = synced = False
    for event in [*events, "sync"]:
        if isinstance(event, tuple):
            script.hold(event[0], request(event[1]))
            # Dropped by the driver whenever it likes: before it was told, too.
            dropped = dropped or event[0] == 4
            if event[0] == 4:
                script.drop(4)
        for engine in order:
            order[engine] += told(script, engine)
        ready = not any(script.waits_for_requests(engine) for engine in order)
        if event == "sync" and ready and not synced:
            synced = True
            for method in ("update_weights", "publish"):
                for engine, commands in order.items():
                    script.tell(engine, method, (1,))
                    commands.append([method])
            for engine in order:
                order[engine] += told(script, engine)
    sync = [["update_weights"], ["publish"]]
    assert order[0] == [[NAMES[0], NAMES[2]], [NAMES[4]], ["-4"], *sync, [NAMES[6]]]
    assert order[1] == [[NAMES[3], NAMES[1]], *sync, [NAMES[5]], [NAMES[7]]]


def test_an_abort_waits_until_the_request_is_not_wanted_or_was_completed() -> None:
    for end in ("dropped", "completed"):
        script = Script(segment())
        for own in (0, 2, 4):
            script.hold(own, request(NAMES[own]))
        assert told(script, 0) == [[NAMES[0], NAMES[2]], [NAMES[4]]]
        if end == "dropped":
            script.drop(4)
        else:
            script.completed(0, [Made(NAMES[4], 3, "digest")])
        assert told(script, 0) == [["-4"]]


def test_a_name_that_comes_again_is_the_next_one_of_that_name() -> None:
    """Validations ask for the same trajectories each time."""
    commands = {0: [submit("v"), Command("sleep"), submit("v", "w")]}
    script = Script(Segment(0, {}, commands, {0: [0, 4, 4]}))
    script.hold(1, request("v"))
    assert told(script, 0) == [["v"]]
    script.hold(2, request("v"))
    script.tell(0, "sleep", ())
    assert told(script, 0) == []
    script.hold(3, request("w"))
    assert script.next_of_requests(0) == {2: request("v"), 3: request("w")}


@pytest.mark.parametrize(
    "other, named",
    [
        (request(NAMES[3], 5), r"b1\.p1\.s1.*engine 1, after step 0.*seed is 5, in the run 0"),
        (request(NAMES[6], 0, 1), r"b1\.p3\.s0.*engine 0, after step 9.*1 tokens, in the run 3"),
        (request(NAMES[6], 0, 1, 2, 3), "prompt of 3 tokens is another than in the run"),
    ],
)
def test_another_request_of_the_same_name_is_named(other: Request, named: str) -> None:
    with pytest.raises(Divergence, match=named):
        Script(segment()).hold(0, other)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"token_ids": (5,), "logprobs": (-0.5,)}, r"a \(engine 0\) has 1 tokens, in the run 2"),
        ({"logprobs": (-0.5, -0.125)}, r"a \(engine 0\) has 2 tokens as in the run, but not"),
    ],
)
def test_another_completion_is_named(change: dict[str, tuple[float, ...]], named: str) -> None:
    parts = {"token_ids": (5, 6), "logprobs": (-0.5, -0.25), "finish_reason": "stop"}
    run = made("a", Completion(**parts, versions=((0, 0),)))  # type: ignore[arg-type]
    script = Script(Segment(0, {}, {0: [submit("a")] * 2}, {0: [0, 3]}, {"a": [run]}))
    for own in (0, 1):
        script.hold(own, request("a"))
        told(script, 0)
    script.completed(0, [run])
    script.completed(0, [run])  # the run was stopped before this one came
    again = Script(Segment(0, {}, {0: [submit("a")]}, {0: [0]}, {"a": [run]}))
    again.hold(0, request("a"))
    told(again, 0)
    here = Completion(**(parts | change), versions=((0, 0),))  # type: ignore[arg-type]
    with pytest.raises(Divergence, match=named):
        again.completed(0, [made("a", here)])


def test_what_the_trainer_tells_must_be_what_it_told() -> None:
    script = Script(segment())
    script.hold(3, request(NAMES[3]))
    script.hold(1, request(NAMES[1]))
    told(script, 1)
    with pytest.raises(Divergence, match="told publish of policy 1, in the run update_weights of"):
        script.tell(1, "publish", (1,))
    with pytest.raises(Divergence, match="weights of policy 2, in the run update_weights of pol"):
        script.tell(1, "update_weights", (2, 0))
    with pytest.raises(Divergence, match="told sleep, in the run submit"):
        script.tell(0, "sleep", ())


def test_what_does_not_come_and_what_came_instead() -> None:
    script = Script(segment())
    script.hold(0, request(NAMES[0]))
    script.hold(9, request("b7.p0.s0.t0.a0"))
    assert script.waits_for_requests(0) and told(script, 0) == []
    lacks = script.lacks()
    assert f"submit did not come (engine 0, after step 0): {NAMES[2]};" in lacks
    assert f"(engine 1, after step 0): {NAMES[3]}, {NAMES[1]};" in lacks
    assert "the run has not: b7.p0.s0.t0.a0" in lacks


def test_more_or_less_of_a_trajectory_than_in_the_run_is_named_at_once() -> None:
    script = Script(segment())
    with pytest.raises(Divergence, match=r"request b1\.p0\.s0\.t0\.a1 is none of the run's"):
        script.hold(9, request("b1.p0.s0.t0.a1"))
    with pytest.raises(Divergence, match=r"b1\.p3\.s1 has ended, .* b1\.p3\.s1\.t0\.a0 followed"):
        script.ended("b1.p3.s1")
    script.hold(0, request(NAMES[0]))
    script.ended("b1.p0.s0")


def test_a_step_trains_on_what_it_did() -> None:
    script = Script(segment())
    script.trained(1, TRAJECTORIES[:3])
    with pytest.raises(Divergence, match=r"on b1\.p3\.s1, in the run b1\.p2\.s0"):
        script.trained(2, [TRAJECTORIES[3], "b1.p3.s1"])
    with pytest.raises(Divergence, match="on no others, in the run in another order"):
        script.trained(2, TRAJECTORIES[3:5][::-1])


def test_a_group_that_is_not_trained_on_is_named_where_a_repeated_step_did() -> None:
    script = Script(segment(), until=1)
    script.not_trained([TRAJECTORIES[3], TRAJECTORIES[7]])
    with pytest.raises(Divergence, match=rf"{TRAJECTORIES[1]} is not to be .* step 1 trained"):
        script.not_trained(TRAJECTORIES[1:3])


def test_steps_and_their_end() -> None:
    script = Script(segment())
    assert script.until == 2 and script.engines == 2 and script.schedule(1) == [0, 3, 3, 3, 8]
    assert script.trajectories(2) == TRAJECTORIES[3:5]
    with pytest.raises(EndOfScript):
        script.trajectories(3)
    with pytest.raises(EndOfScript):
        Script(segment(), until=1).trajectories(2)


def test_after_the_end_of_the_journal_the_trainer_may_tell_anything() -> None:
    script = Script(Segment(0, {}, {0: [Command("sleep")]}, {0: [0]}))
    script.tell(0, "sleep", ())
    script.tell(0, "update_weights", (1, 0))
    assert script.next_of_requests(0) is None and not script.waits_for_requests(0)
