"""The loop of engine ranks, with engines that note what they are told and when."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from queue import Queue
from typing import Any

import pytest

from rlhf3d.rollout import engine_loop
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, written_by
from rlhf3d.rollout.engine_loop import EngineLoop, Progress

WAIT_S = 20.0


def request(tokens: int) -> Request:
    """One that is finished after so many steps."""
    return Request((1,), 0, SamplingSettings(max_tokens=tokens))


def short(*numbers: int) -> dict[int, Request]:
    return {number: request(1) for number in numbers}


class Engine:
    """A rank that writes down each step's requests; `told` carries rank 0's number to it."""

    def __init__(self, told: Sequence[Queue[int]] = (), own: Queue[int] | None = None) -> None:
        self.told, self.own = told, own
        self.left: dict[int, int] = {}
        self.log: list[Any] = []
        self.threads: set[int] = set()
        self.agreed = 0
        self.limits_s: set[float] = set()
        self.published = True
        self.may_step = threading.Event()
        self.may_step.set()

    @property
    def unfinished(self) -> bool:
        return bool(self.left)

    @property
    def can_step(self) -> bool:
        return self.unfinished and self.published

    def update(self) -> None:
        self.published = False
        self._note(("update",))

    def publish(self) -> None:
        self.published = True
        self._note(("publish",))

    def submit(self, requests: Mapping[int, Request]) -> None:
        self._note(("submit", *requests))
        self.left |= {number: one.sampling.max_tokens for number, one in requests.items()}

    def abort(self, numbers: Collection[int]) -> None:
        self._note(("abort", *numbers))
        for number in numbers:
            self.left.pop(number, None)

    def step(self) -> dict[int, Completion]:
        assert self.may_step.wait(WAIT_S) and self.published
        self._note(("step", *self.left))
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if not left]
        for number in done:
            del self.left[number]
        if self.own is not None:
            return {}
        return {number: Completion((5,), (0.0,), "length", written_by(0)) for number in done}

    def agree(self, number: int, timeout_s: float) -> int:
        self.agreed += 1
        self.limits_s.add(timeout_s)
        for queue in self.told:
            queue.put(number)
        return number if self.own is None else self.own.get(timeout=WAIT_S)

    def add(self, first: int, second: int) -> int:
        self._note(("add", first, second))
        return first + second

    def fail(self) -> None:
        raise KeyError("the cause")

    def close(self) -> None:
        self._note(("close",))

    def _note(self, what: Any) -> None:
        self.log.append(what)
        self.threads.add(threading.get_ident())


def start(
    engine: Engine, rank: int = 0, timeout_s: float = WAIT_S, schedule: Sequence[int] = ()
) -> EngineLoop:
    loop = EngineLoop(
        lambda: engine, rank=rank, name=f"rank {rank}", timeout_s=timeout_s, schedule=schedule
    )
    loop.wait_started(WAIT_S)
    return loop


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    yield start(engine)


def drain(loop: EngineLoop, after: int) -> dict[int, Completion]:
    made: dict[int, Completion] = {}
    while not (told := loop.poll(after, WAIT_S)).idle:
        made |= told.completions
    return made | told.completions


def test_commands_are_applied_in_the_order_of_their_numbers(
    engine: Engine, loop: EngineLoop
) -> None:
    loop.send(3, "submit", short(8))
    loop.send(2, "submit", short(7))
    assert loop.poll(0, 0.05) == Progress({}, 0, True) and engine.log == []
    assert loop.call(1, "add", 2, 3) == 5
    assert sorted(drain(loop, 3)) == [7, 8]
    assert engine.log == [("add", 2, 3), ("submit", 7), ("submit", 8), ("step", 7, 8)]
    assert engine.threads == {next(iter(engine.threads))} - {threading.get_ident()}


def test_an_idle_engine_does_nothing(engine: Engine, loop: EngineLoop) -> None:
    loop.call(1, "add", 1, 1)
    agreed = engine.agreed
    time.sleep(0.2)
    assert engine.agreed == agreed == 1


def test_a_poll_returns_at_once_when_all_is_done_and_else_in_parts(
    engine: Engine, loop: EngineLoop
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_loop, "PART_S", 20.0)
        began = time.monotonic()
        loop.send(1, "submit", short(0))
        assert list(loop.poll(1, WAIT_S).completions) == [0]
        assert time.monotonic() - began < 20.0
    # Between two parts of a busy engine there is time for more completions.
    engine.may_step.clear()
    loop.send(2, "submit", {1: request(1), 2: request(2), 3: request(10_000_000)})
    assert not loop.poll(2, 0.05).idle
    engine.may_step.set()
    assert sorted(loop.poll(2, WAIT_S).completions) == [1, 2]
    assert loop.poll(2, 0.01).completions == {}
    loop.send(3, "abort", [3])
    assert loop.poll(3, WAIT_S).idle


def test_what_was_aborted_is_not_handed_out(engine: Engine, loop: EngineLoop) -> None:
    loop.send(1, "submit", {0: request(1), 1: request(1), 2: request(1)})
    while engine.unfinished or len(engine.log) < 2:
        time.sleep(0.001)
    loop.call(2, "abort", [1])
    assert sorted(drain(loop, 2)) == [0, 2]


def test_a_command_that_is_to_be_alone_waits_for_the_end_of_requests(
    engine: Engine, loop: EngineLoop
) -> None:
    engine.may_step.clear()
    loop.send(1, "submit", {0: request(3), 1: request(2)})
    loop.send(2, "submit", short(2), alone=True)
    loop.send(3, "submit", short(3))
    loop.send(4, "submit", short(4), alone=True)
    engine.may_step.set()
    assert sorted(drain(loop, 4)) == [0, 1, 2, 3, 4]
    steps = [what[1:] for what in engine.log if what[0] == "step"]
    assert steps == [(0, 1), (0, 1), (0,), (2, 3), (4,)]


def test_from_an_update_until_its_publication_running_requests_wait(engine: Engine) -> None:
    loop = start(engine)
    loop.send(1, "submit", {0: request(1_000_000), 1: request(1_000_000)})
    loop.call(2, "update")
    agreed, steps = engine.agreed, loop.poll(2, 0).steps
    assert not loop.poll(2, 0.1).idle, "they are unfinished"
    assert loop.call(3, "add", 1, 1) == 2
    loop.send(4, "abort", [0])
    told = loop.poll(4, 0.1)
    assert told.steps == steps and engine.agreed <= agreed + 2, "it waits for commands"
    loop.call(5, "publish")
    while loop.poll(5, 0.01).steps == steps:
        pass
    since = engine.log[engine.log.index(("update",)) :]
    assert since[:5] == [("update",), ("add", 1, 1), ("abort", 0), ("publish",), ("step", 1)]
    loop.call(6, "update")
    with pytest.raises(AssertionError, match="waits until all requests are done"):
        loop.call(7, "add", 1, 1, alone=True)


def test_a_poll_sees_no_end_before_what_was_sent_has_come(loop: EngineLoop) -> None:
    polled: Queue[Progress] = Queue()
    threading.Thread(target=lambda: polled.put(loop.poll(1, WAIT_S))).start()
    time.sleep(0.05)
    assert polled.empty(), "command 1 has not come yet: nothing is known"
    loop.send(1, "submit", short(4))
    assert list(polled.get(timeout=WAIT_S).completions) == [4]


def test_what_a_call_raises_is_its_own_and_what_a_sent_command_raises_ends_the_loop(
    loop: EngineLoop,
) -> None:
    with pytest.raises(KeyError, match="the cause"):
        loop.call(1, "fail")
    assert loop.call(2, "add", 1, 1) == 2
    loop.send(3, "fail")
    for use in (lambda: loop.poll(3, WAIT_S), lambda: loop.call(4, "add", 1, 1)):
        with pytest.raises(KeyError, match="the cause"):
            use()


def test_a_start_that_fails_is_told() -> None:
    def raises() -> Engine:
        raise ValueError("no model")

    loop = EngineLoop(raises, rank=0, name="engine 0", timeout_s=1)
    with pytest.raises(ValueError, match="no model"):
        loop.wait_started(WAIT_S)


def test_a_command_that_does_not_end_is_named(engine: Engine) -> None:
    loop = start(engine, timeout_s=0.2)
    engine.may_step.clear()
    loop.send(1, "submit", short(0))
    while not engine.log:
        time.sleep(0.001)
    with pytest.raises(TimeoutError, match=r"rank 0: add \(command 2\) did not end within 0 s"):
        loop.call(2, "add", 1, 1)
    engine.may_step.set()


def ranks_of(count: int, schedule: Sequence[int] = ()) -> tuple[list[Engine], list[EngineLoop]]:
    """An engine of several ranks, each in its thread."""
    queues: list[Queue[int]] = [Queue() for _ in range(1, count)]
    engines = [Engine(queues), *(Engine(own=queue) for queue in queues)]
    loops = [start(engine, rank, schedule=schedule) for rank, engine in enumerate(engines)]
    return engines, loops


def test_ranks_apply_each_command_before_the_same_step() -> None:
    """Commands come to the ranks at random times, many while they step, some while they may not."""
    engines, loops = ranks_of(3)
    chance = random.Random(3)

    def deliver(loop: EngineLoop, seed: int) -> None:
        own = random.Random(seed)
        for number in range(1, 61):
            if number % 10 in (6, 8):
                loop.send(number, "update" if number % 10 == 6 else "publish")
            elif number % 5:
                requests = {10 * number + i: request(1 + (number + i) % 7) for i in range(3)}
                loop.send(number, "submit", requests)
            else:
                loop.send(number, "abort", [10 * (number - 1), 10 * (number - 2)])
            if own.random() < 0.5:
                time.sleep(0.002 * own.random())

    senders = [
        threading.Thread(target=deliver, args=(loop, chance.randrange(99))) for loop in loops
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    made = drain(loops[0], 60)
    for loop in loops[1:]:
        assert drain(loop, 60) == {}
    assert engines[0].log == engines[1].log == engines[2].log
    steps = [what for what in engines[0].log if what[0] == "step"]
    assert len(made) > 80 and len(steps) > 20
    assert {len(loop.poll(60, 0).completions) for loop in loops} == {0}
    assert {loop.poll(60, 0).steps for loop in loops} == {len(steps)}


def test_a_rank_that_does_not_get_a_command_names_it() -> None:
    queue: Queue[int] = Queue()
    follower_engine = Engine(own=queue)
    leader, follower = start(Engine([queue])), start(follower_engine, 1, timeout_s=0.2)
    for loop in (leader, follower):
        loop.send(1, "submit", {0: request(10_000_000)})
    leader.send(2, "abort", [0])
    with pytest.raises(TimeoutError, match="rank 1: command 2, which rank 0 of the engine has"):
        while True:
            follower.poll(1, WAIT_S)
    assert follower_engine.limits_s == {0.2}


def deliver(loop: EngineLoop, chance: random.Random) -> None:
    """Forty commands at random times; some submit, some abort, some are waited for."""
    for number in range(1, 41):
        if number % 7 == 0:
            loop.send(number, "abort", [10 * (number - 1), 10 * (number - 2)])
        elif number % 11 == 0:
            assert loop.call(number, "add", number, 1) == number + 1
        else:
            requests = {10 * number + i: request(1 + (number + i) % 9) for i in range(2)}
            loop.send(number, "submit", requests)
        if chance.random() < 0.4:
            time.sleep(0.004 * chance.random())


def repeated(ranks: int, schedule: Sequence[int], seed: int) -> tuple[list[Engine], list[Progress]]:
    """Commands come to the ranks at the times of `seed`; what the engines and rank 0 say of it."""
    engines, loops = ranks_of(ranks, schedule)
    senders = []
    for rank, loop in enumerate(loops):
        chance = random.Random(100 * seed + rank)
        senders.append(threading.Thread(target=deliver, args=(loop, chance)))
    for sender in senders:
        sender.start()
    told = [loops[0].poll(40, 0.01)]
    while not told[-1].idle:
        told.append(loops[0].poll(40, 0.01))
    for sender, loop in zip(senders, loops, strict=True):
        sender.join()
        while not (last := loop.poll(40, WAIT_S)).idle:
            pass
        assert loop is loops[0] or last.applied == (), "rank 0 tells it"
    return engines, told


def applied(told: Sequence[Progress]) -> list[tuple[int, int]]:
    """What rank 0 told of commands, in all its answers."""
    return [one for progress in told for one in progress.applied]


@pytest.mark.parametrize("ranks", [1, 2])
def test_with_a_schedule_commands_come_before_the_same_steps_whenever_they_arrive(
    ranks: int,
) -> None:
    first, told = repeated(ranks, (), seed=0)
    when = applied(told)
    assert [number for number, _ in when] == list(range(1, 41))
    schedule = [step for _, step in when]
    assert schedule == sorted(schedule) and schedule[-1] > 20, "else the times say nothing"
    others = []
    for seed in range(1, 5):
        # Without a schedule, other times are other steps: else this test could not fail.
        others.append(repeated(ranks, (), seed)[0][0].log != first[0].log)
        again, told = repeated(ranks, schedule, seed)
        assert [engine.log for engine in again] == [first[0].log] * ranks
        assert applied(told) == when
    assert any(others)


def test_what_is_due_is_waited_for_one_by_one(engine: Engine) -> None:
    """The driver may wait for the result of one before it sends the next."""
    loop = start(engine, schedule=[0, 2, 2, 2])
    loop.send(1, "submit", {0: request(4)})
    until = time.monotonic() + WAIT_S
    while len(engine.log) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    assert engine.log == [("submit", 0), ("step", 0), ("step", 0)]
    assert loop.call(2, "add", 1, 1) == 2
    assert loop.call(3, "add", 2, 2) == 4
    time.sleep(0.05)
    assert len(engine.log) == 5, "it steps before command 4"
    loop.send(4, "submit", short(1))
    drain(loop, 4)
    assert engine.log[5:] == [("submit", 1), ("step", 0, 1), ("step", 0)]


def test_what_is_due_and_does_not_come_is_named(engine: Engine) -> None:
    loop = start(engine, timeout_s=0.2, schedule=[0, 3])
    loop.send(1, "submit", {0: request(9)})
    with pytest.raises(TimeoutError, match="rank 0: command 2, which is due after step 3"):
        while True:
            loop.poll(1, WAIT_S)
    assert engine.log[1:] == [("step", 0)] * 3


def test_an_engine_without_work_before_what_is_due_says_so(engine: Engine) -> None:
    loop = start(engine, schedule=[0, 3])
    loop.send(1, "submit", {0: request(2)})
    loop.send(2, "submit", short(1))
    with pytest.raises(RuntimeError, match=r"command 2 is due after step 3, .* after step 2"):
        while True:
            loop.poll(2, WAIT_S)


def test_a_part_of_a_schedule_can_be_repeated(engine: Engine) -> None:
    """The end comes before commands that are not sent any more; what is later comes as it comes."""
    loop = start(engine, schedule=[0, 5])
    loop.send(1, "submit", {0: request(1_000_000)})
    loop.call(2, "close")
    assert engine.log[-1] == ("close",)
    engine = Engine()
    loop = start(engine, schedule=[0])
    loop.send(1, "submit", {0: request(3)})
    loop.send(2, "submit", short(1), alone=True)
    assert sorted(drain(loop, 2)) == [0, 1]
    assert engine.log[-2:] == [("submit", 1), ("step", 1)]


def loops_running() -> int:
    return [thread.name for thread in threading.enumerate()].count("rank 0")


def test_the_loop_ends_with_its_engine(engine: Engine, loop: EngineLoop) -> None:
    before = loops_running()
    loop.call(1, "close")
    for _ in range(200):
        if loops_running() < before:
            break
        time.sleep(0.01)
    assert loops_running() == before - 1
