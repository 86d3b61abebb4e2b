"""Many trajectories with environments at once: order, failures, and how many are alive."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Timer
from typing import Any

import pytest
from support.talking import (
    TOKENIZER,
    Echo,
    FakeSession,
    FakeSessions,
    TalkingEngine,
    asked,
    failed,
    rules,
    runner,
    said,
)

from rlhf3d.environments.api import Call, Reply, Reset, Step
from rlhf3d.experience.environment_runner import EnvironmentFailed, EnvironmentRunner, Finished
from rlhf3d.experience.requests import Requests, TrajectoryRequest
from rlhf3d.experience.steps import Patience
from rlhf3d.observability.live.state import Waited
from rlhf3d.observability.live.waits import waited
from rlhf3d.pool.process import CallResult, Ending, StartError
from rlhf3d.rewards.score import Outcome
from rlhf3d.rollout.api import Completion, SamplingSettings

SAMPLING = SamplingSettings(max_tokens=100)


def requests(count: int) -> list[TrajectoryRequest]:
    return Requests(0, 1).draw([asked(number) for number in range(count)], 1, SAMPLING)


def play(
    running: EnvironmentRunner, engine: TalkingEngine, count: int
) -> tuple[dict[int, Finished], list[list[int]]]:
    """What became of them, and which ended together."""
    finished: dict[int, Finished] = {}
    parts = []
    for part in running.run(engine, requests(count), Patience()):
        assert not finished.keys() & part.keys()
        finished |= part
        if part:
            parts.append(sorted(part))
    return finished, parts


def test_trajectories_end_whenever_they_do() -> None:
    sessions = FakeSessions()
    engine = TalkingEngine(["a", "b", "end"], ["end"], ["c", "end"])
    finished, parts = play(runner(sessions), engine, 3)
    assert sorted(finished) == [0, 1, 2] and len(parts) == 3
    assert [len(finished[n].trajectory.turns) for n in range(3)] == [3, 1, 2]
    assert [finished[n].text for n in range(3)] == ["end"] * 3
    assert [finished[n].episode.record for n in range(3)] == [{"last": "end"}] * 3  # type: ignore[union-attr]
    assert len(sessions.sessions) == 3 and not sessions.alive
    assert all(len(one.episode.calls_s) for one in finished.values())  # type: ignore[union-attr]


def test_as_many_are_alive_as_may_be() -> None:
    sessions, most = FakeSessions(), []

    class Counting(Echo):
        def __call__(self, call: Call) -> Reply:
            most.append(sessions.alive)
            return super().__call__(call)

    sessions.make = Counting
    finished, _ = play(runner(sessions, max_concurrent=3), TalkingEngine(["a", "end"]), 8)
    assert len(finished) == 8 and max(most) <= 3 and not sessions.alive


def test_rounds_ask_for_all_turns_at_once_in_the_order_of_the_requests() -> None:
    scripts = ["a", "b", "end"], ["end"], ["c", "end"]
    engine = TalkingEngine(*scripts)
    play(runner(FakeSessions(), rounds=True), engine, 3)
    assert [list(batch) for batch in engine.submitted] == [[0, 1, 2], [0, 2], [0]]
    free = TalkingEngine(*scripts)
    play(runner(FakeSessions()), free, 3)
    assert len(free.submitted) > 3, "without rounds each goes on as soon as it can"


def test_rounds_wait_for_the_slowest_environment() -> None:
    """Of two, the first answers its reset late; both turns are asked for together all the same."""
    engine = TalkingEngine(["end"])
    slow = SlowSessions([0.2, 0.0])
    play(EnvironmentRunner(slow, rules(rounds=True)), engine, 2)
    assert [list(batch) for batch in engine.submitted] == [[0, 1]]
    engine = TalkingEngine(["end"])
    play(EnvironmentRunner(SlowSessions([1.0, 0.0]), rules()), engine, 2)
    assert [list(batch) for batch in engine.submitted] == [[1], [0]]


class SlowSession(FakeSession):
    """Replies after some seconds, from another thread."""

    delay_s = 0.0

    def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
        reply = super().call(payload, timeout_s)
        if not self.delay_s:
            return reply
        later: Future[CallResult] = Future()
        Timer(self.delay_s, lambda: later.set_result(reply.result())).start()
        return later


class SlowSessions(FakeSessions):
    """The n-th environment replies with the n-th delay."""

    def __init__(self, delays_s: list[float]) -> None:
        super().__init__()
        self.delays_s = delays_s

    def session(self) -> FakeSession:
        made = SlowSession(self.make())
        made.delay_s = self.delays_s[len(self.sessions) % len(self.delays_s)]
        self.sessions.append(made)
        return made


def test_one_that_waits_for_its_environment_keeps_no_other() -> None:
    sessions = SlowSessions([1.0, 0.0, 0.0, 0.0])
    start = time.monotonic()
    ended = {}
    engine = TalkingEngine(["a", "end"])
    for part in EnvironmentRunner(sessions, rules()).run(engine, requests(4), Patience()):
        for number in part:
            ended[number] = time.monotonic() - start
    # Had they been kept for it, all would come in one part.
    assert max(ended[n] for n in (1, 2, 3)) < ended[0] - 0.1


class Flaky:
    """Fails in its first attempts; counts them over all instances."""

    made: list[int]

    def __init__(self, fail: int, result: CallResult) -> None:
        self.fail, self.result = fail, result
        self.attempts: list[Reset] = []

    def make(self) -> Any:
        echo = Echo()

        def environment(call: Call) -> Reply | CallResult:
            if isinstance(call, Reset):
                self.attempts.append(call)
                return echo(call)
            return self.result if len(self.attempts) <= self.fail else echo(call)

        return environment


def test_one_that_fails_begins_again_with_the_same_seed() -> None:
    flaky = Flaky(1, failed())
    sessions = FakeSessions(flaky.make)
    engine = TalkingEngine(["end"])
    finished, _ = play(runner(sessions, retries=1, max_error_rate=0.0), engine, 1)
    names = [request.name for part in engine.submitted for request in part.values()]
    assert names == ["b1.p0.s0.t0.a0", "b1.p0.s0.t0.a1"]
    first, second = flaky.attempts
    assert first == second and len(sessions.sessions) == 2 and not sessions.alive
    assert finished[0].failure is None and finished[0].episode.retries == 1  # type: ignore[union-attr]
    assert len(finished[0].trajectory.turns) == 1, "nothing of the attempt that failed"


@pytest.mark.parametrize(
    ("result", "outcome", "message"),
    [
        (failed("Traceback\nKeyError: 'x'"), Outcome.ENV_ERROR, "KeyError: 'x'"),
        (CallResult(Ending.DIED, message="exit code 3"), Outcome.ENV_ERROR, "exit code 3"),
        (
            CallResult(Ending.TIMEOUT),
            Outcome.ENV_TIMEOUT,
            "no reply within environment.call_timeout_s: 60 s",
        ),
    ],
)
def test_one_that_fails_for_good_is_said_to_have(
    result: CallResult, outcome: Outcome, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    notes: list[str] = []
    sessions = FakeSessions(Flaky(9, result).make)
    running = EnvironmentRunner(sessions, rules(retries=2, max_error_rate=1.0), notes.append)
    with caplog.at_level(logging.WARNING):
        finished, _ = play(running, TalkingEngine(["end"]), 1)
    failure = finished[0].failure
    assert failure is not None and failure.outcome is outcome
    assert failure.message is not None and message in failure.message
    assert "row 0 (test), attempt 3 of 3" in failure.message
    assert len(sessions.sessions) == 3 and not sessions.alive
    assert len(notes) == 1 and f"{outcome.value} in a trajectory of row 0" in notes[0]
    assert message in notes[0] and "attempt 1 of 3" in caplog.text


def test_too_many_that_fail_stop_it_with_the_cause_and_leave_nothing_alive() -> None:
    sessions = FakeSessions(Flaky(99, failed("NameError: name 'doors'")).make)
    running = runner(sessions, retries=0, max_error_rate=0.3)
    with pytest.raises(EnvironmentFailed, match=r"2 of 4 [\s\S]*row \d[\s\S]*'doors'[\s\S]*fix"):
        play(running, TalkingEngine(["end"]), 4)
    assert not sessions.alive


def test_one_failure_stops_no_small_collection() -> None:
    """5% of 4 are none: a single accident would end the run."""

    class Breaks(Echo):
        broken: tuple[int, ...] = (1,)

        def __call__(self, call: Call) -> Any:
            if isinstance(call, Reset) and call.row["index"] in self.broken:
                return failed("no such door")
            return super().__call__(call)

    class BreaksTwice(Breaks):
        broken = (1, 2)

    engine = TalkingEngine(["end"])
    finished, _ = play(runner(FakeSessions(Breaks), retries=0), engine, 4)
    assert [finished[n].failure is None for n in range(4)] == [True, False, True, True]
    with pytest.raises(EnvironmentFailed, match=r"2 of 4 .*max_error_rate=0.05 allows 1\."):
        play(runner(FakeSessions(BreaksTwice), retries=0), engine, 4)
    with pytest.raises(EnvironmentFailed, match=r"1 of 4 .*max_error_rate=0.0 allows 0\."):
        play(runner(FakeSessions(Breaks), retries=0, max_error_rate=0.0), engine, 4)


def test_a_reply_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool has a deadline for every call; were it to lose one, the run would wait for ever."""
    monkeypatch.setattr("rlhf3d.experience.environment_runner._MARGIN_S", 0.1)
    monkeypatch.setattr("rlhf3d.experience.environment_runner.STARTUP_S", 0.1)

    class Session(FakeSession):
        def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
            return Future() if isinstance(payload, Step) else super().call(payload, timeout_s)

    class Sessions(FakeSessions):
        def session(self) -> FakeSession:
            self.sessions.append(Session(Echo()))
            return self.sessions[-1]

    seen: list[Waited | None] = []

    class Replies(SimpleQueue):  # type: ignore[type-arg]
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            seen.append(waited())
            return super().get(block, timeout)

    monkeypatch.setattr("rlhf3d.experience.environment_runner.SimpleQueue", Replies)
    sessions = Sessions()
    with pytest.raises(
        EnvironmentFailed, match=r"2 calls .* row \d \(test\).* environment.call_timeout_s=0.1"
    ):
        play(EnvironmentRunner(sessions, rules(call_timeout_s=0.1)), TalkingEngine(["a"]), 2)
    assert not sessions.alive
    named = [wait for wait in seen if wait is not None]
    both = ["the environment of row 0", "the environment of row 1"]
    assert named[-1].names == both and named[-1].timeout_s == 0.1 and waited() is None


def test_too_many_that_fail_leave_no_turn_in_the_engines() -> None:
    class Breaks(Echo):
        def __call__(self, call: Call) -> Any:
            return failed() if isinstance(call, Step) else super().__call__(call)

    sessions, engine = FakeSessions(Breaks), TalkingEngine(["a"])
    with pytest.raises(EnvironmentFailed):
        play(runner(sessions, retries=0, max_error_rate=0.0), engine, 4)
    assert not sessions.alive and engine.unfinished == 0


def test_a_trajectory_has_a_budget_for_all_its_calls() -> None:
    """Each call takes 0.1 s, so that of 0.25 s the third has 0.05 s left, and no fourth is made."""
    given = []

    class Session(FakeSession):
        def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
            given.append(timeout_s)
            return super().call(payload, timeout_s)

    class Timed(Echo):
        def __call__(self, call: Call) -> Any:
            return CallResult(Ending.VALUE, super().__call__(call), seconds=0.1)

    class Sessions(FakeSessions):
        def session(self) -> FakeSession:
            return Session(Timed())

    own = rules(trajectory_timeout_s=0.25, call_timeout_s=0.2, retries=0, max_error_rate=1.0)
    finished, _ = play(EnvironmentRunner(Sessions(), own), TalkingEngine(["a"]), 1)
    failure = finished[0].failure
    assert failure is not None and failure.outcome is Outcome.ENV_TIMEOUT
    assert "environment.trajectory_timeout_s=0.25" in str(failure.message)
    assert given == pytest.approx([0.2, 0.15, 0.05])
    # As far as it came, for people to read.
    assert finished[0].episode is not None and len(finished[0].episode.messages) == 6


def test_loading_the_users_file_takes_nothing_of_the_budget() -> None:
    """The first call is answered late, as the file takes long to load; its own time was short."""

    class Session(SlowSession):
        delay_s = 0.3

        def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
            self.delay_s = 0.3 if isinstance(payload, Reset) else 0.0
            return super().call(payload, timeout_s)

    class Timed(Echo):
        def __call__(self, call: Call) -> Any:
            return CallResult(Ending.VALUE, super().__call__(call), seconds=0.01)

    class Sessions(FakeSessions):
        def session(self) -> FakeSession:
            return Session(Timed())

    own = rules(trajectory_timeout_s=0.2, call_timeout_s=0.2, retries=0, max_error_rate=1.0)
    finished, _ = play(EnvironmentRunner(Sessions(), own), TalkingEngine(["a", "end"]), 1)
    assert finished[0].failure is None
    assert finished[0].episode is not None and finished[0].episode.calls_s == (0.01,) * 3


def test_an_observation_that_is_refused_fails_its_trajectory() -> None:
    own = {"max_observation_tokens": 3, "overlong_observations": "error"}
    running = runner(FakeSessions(), retries=0, max_error_rate=1.0, **own)
    finished, _ = play(running, TalkingEngine(["a"], ["end"]), 2)
    assert finished[0].failure is not None and finished[1].failure is None
    assert "max_observation_tokens = 3" in str(finished[0].failure.message)


def test_environments_that_cannot_start_stop_it() -> None:
    class Session(FakeSession):
        def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
            broken: Future[CallResult] = Future()
            broken.set_exception(StartError("environment.path did not load"))
            return broken

    class Sessions(FakeSessions):
        def session(self) -> FakeSession:
            return Session(Echo())

    with pytest.raises(EnvironmentFailed, match="did not load"):
        play(EnvironmentRunner(Sessions(), rules()), TalkingEngine(["a"]), 1)


def test_an_end_by_a_limit_is_no_failure() -> None:
    running = runner(FakeSessions(), max_turns=2)
    finished, _ = play(running, TalkingEngine(["a"], [said("half", ended=False)]), 2)
    assert [finished[n].episode.end for n in range(2)] == ["max_turns", "length"]  # type: ignore[union-attr]
    assert finished[0].episode.record == {"finished": True}  # type: ignore[union-attr]
    assert (
        finished[1].text == "half"
        and TOKENIZER.decode(finished[1].trajectory.turns[0].token_ids) == "half"
    )


class WaitingEngine(TalkingEngine):
    """Answers the first trajectory once the second has asked, or after long; polls as real ones."""

    LONG_S = 30.0

    def __init__(self, *scripts: list[str]) -> None:
        super().__init__(*scripts)
        self.asked: set[int] = set()
        self.start = time.monotonic()

    def submit(self, requests: Any) -> None:
        super().submit(requests)
        self.asked |= set(requests)

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        held = 1 not in self.asked and time.monotonic() - self.start < self.LONG_S
        ready = [number for number in self._waiting if number or not held]
        if not ready:
            time.sleep(timeout_s)
            return {}
        request = self._waiting.pop(ready[0])
        others, self._waiting = self._waiting, {ready[0]: request}
        found = super().poll(0.0)
        self._waiting = others
        return found


def test_a_reply_does_not_wait_for_the_engines() -> None:
    """While the engine writes one turn, the other's environment replies, and it is asked."""
    engine = WaitingEngine(["end"])
    play(EnvironmentRunner(SlowSessions([0.0, 0.2]), rules()), engine, 2)
    assert time.monotonic() - engine.start < engine.LONG_S


class Talkative(Echo):
    """Its reset makes some prompts long."""

    def __call__(self, call: Call) -> Any:
        reply = super().__call__(call)
        if isinstance(call, Reset) and call.row["index"] == 1:
            (asked_for,) = call.row["prompt"]
            longer = {**asked_for, "content": "go" + "!" * 100}
            return Reply(prompt=(longer,))
        return reply


def test_a_prompt_that_reset_makes_too_long_follows_overlong_prompts() -> None:
    """It is no failure of the environment: not tried again, and it does not stop the run."""
    engine, sessions = TalkingEngine(["end"]), FakeSessions(Talkative)
    filtered = runner(sessions, overlong_prompts="filter", max_error_rate=0.0)
    finished, _ = play(filtered, engine, 3)
    failure = finished[1].failure
    assert failure is not None and failure.outcome is Outcome.OVERLONG_PROMPT
    assert failure.unfinished and "data.max_prompt_length = 64: the prompt of row 1" in str(
        failure.message
    )
    assert finished[0].failure is None and finished[2].failure is None
    assert len(sessions.sessions) == 3 and not sessions.alive
    with pytest.raises(ValueError, match=r"the prompt of row 1 .* data.overlong_prompts"):
        play(runner(FakeSessions(Talkative)), TalkingEngine(["end"]), 3)

    cut = runner(FakeSessions(Talkative), overlong_prompts="truncate_left")
    finished, _ = play(cut, TalkingEngine(["end"]), 3)
    row = finished[1].trajectory.rows[0]
    assert len(row.prompt_ids) == 64 and TOKENIZER.decode(row.prompt_ids[:3]) == "!!!"
    episodes = [finished[n].episode for n in range(3)]
    assert [one.prompt_truncated for one in episodes if one is not None] == [False, True, False]
    assert finished[1].text == "end"
