"""Many trajectories with environments at once: their calls, their turns and their failures.

Invariant: every request ends once: as a trajectory that its environment or a limit ended, as
`env_error` or `env_timeout` after `environment.retries` further attempts with the same seed, or as
`overlong_prompt`, which no attempt can change.
Nothing waits longer than a deadline of its own trajectory, except with `environment.rounds`, where
a round waits for all of its trajectories.
Runs in: driver.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from rlhf3d.environments.api import Call
from rlhf3d.experience.environment_failures import remedy
from rlhf3d.experience.episode import (
    Action,
    Episode,
    EpisodeRecord,
    OverlongObservation,
    OverlongPrompt,
    Rules,
)
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.steps import Patience
from rlhf3d.experience.trajectory import Trajectory
from rlhf3d.observability.live.state import Waited
from rlhf3d.observability.live.waits import waiting_for
from rlhf3d.pool.process import CallResult, Ending, StartError
from rlhf3d.pool.sessions import STARTUP_S
from rlhf3d.rewards.score import Outcome, Score, one_screen
from rlhf3d.rollout.api import POLL_S, Completion, Engines, Request

_BRIEF_S = 0.02
"""Seconds that a poll of the engines may keep replies of environments waiting."""
_MARGIN_S = 60.0
"""Seconds beyond all deadlines after which a reply is not waited for any longer."""
_LOGGED = 5
"""Failed attempts of one collection whose tracebacks go to the log."""


class EnvironmentFailed(RuntimeError):
    """Too many trajectories had an environment that failed."""


class Session(Protocol):
    """Calls of one environment, see `rlhf3d.pool.sessions`."""

    def call(self, payload: Any, timeout_s: float) -> Future[CallResult]:
        """Make a call."""

    def close(self) -> None:
        """End the environment."""


class Sessions(Protocol):
    """Where environments run."""

    def session(self) -> Session:
        """A new one."""


@dataclass(frozen=True)
class Finished:
    """A trajectory at its end, before it is scored."""

    trajectory: Trajectory
    text: str
    """Its last turn without special tokens."""
    episode: EpisodeRecord | None = None
    """Null without an environment."""
    failure: Score | None = None
    """Where its environment failed for good, or its prompt is too long: the trajectory is as far as
    the last attempt came."""


@dataclass(frozen=True)
class EnvironmentRunner:
    """Runs trajectories with environments."""

    sessions: Sessions
    rules: Rules
    note: Callable[[str], None] = lambda text: None
    """Puts a line before the user."""

    def run(
        self,
        engines: Engines,
        requests: Sequence[TrajectoryRequest],
        patience: Patience,
        judged_by: int | None = None,
    ) -> Iterator[dict[int, Finished]]:
        """Yield trajectories by the numbers of their requests, in parts, as they end.

        {} where `patience` ends before one does. `judged_by`: the number of trajectories that
        `environment.max_error_rate` is a share of, if it is not that of the requests.
        EnvironmentFailed as soon as more of them have failed than `check_failures` allows;
        ValueError for a first prompt that is too long where data.overlong_prompts is error.
        """
        judged_by = len(requests) if judged_by is None else judged_by
        collection = _Collection(self, engines, requests, patience, judged_by)
        try:
            yield from collection.run()
        finally:
            collection.close()


@dataclass(eq=False)
class _Attempt:
    """One attempt at a trajectory, under way."""

    number: int
    retries: int
    """Attempts at the same trajectory before this one."""
    episode: Episode
    session: Session
    called_at: float = 0.0
    """When its last call was made; seconds of a clock that never goes back."""
    timeout_s: float = 0.0
    """Of that call."""
    calls_s: list[float] = field(default_factory=list)


class _Collection:
    """All trajectories of one collection."""

    def __init__(
        self,
        runner: EnvironmentRunner,
        engines: Engines,
        requests: Sequence[TrajectoryRequest],
        patience: Patience,
        judged_by: int,
    ) -> None:
        self._runner, self._engines, self._requests = runner, engines, requests
        self._patience, self._judged_by = patience, judged_by
        self._config = runner.rules.environment
        self._waiting = deque(range(len(requests)))
        """Numbers that are not begun."""
        self._attempts: dict[int, _Attempt] = {}
        """Those that are begun: each is in one of the next three."""
        self._ready: dict[int, Request] = {}
        """Turns that engines are to be asked for."""
        self._writing: set[int] = set()
        self._calling: set[int] = set()
        self._replies: SimpleQueue[tuple[_Attempt, Future[CallResult], float]] = SimpleQueue()
        self._replied_at = 0.0
        """When the last reply was taken."""
        self._finished: dict[int, Finished] = {}
        """Not handed over yet."""
        self._failures: list[Score] = []
        self._attempts_failed = 0

    def run(self) -> Iterator[dict[int, Finished]]:
        """See `EnvironmentRunner.run`."""
        while self._waiting or self._attempts:
            while self._waiting and len(self._attempts) < self._config.max_concurrent:
                self._begin(self._waiting.popleft(), retries=0)
            self._submit()
            for number, completion in self._completions().items():
                self._writing.remove(number)
                attempt = self._attempts[number]
                self._act(attempt, attempt.episode.wrote(completion))
            self._take_replies()
            part, self._finished = self._finished, {}
            yield part

    def close(self) -> None:
        """End what is left, where it ends before all trajectories have."""
        for attempt in self._attempts.values():
            attempt.session.close()
        if self._writing:
            # Left in the engines, they would answer later requests of the same numbers.
            self._engines.abort(self._writing)

    def _begin(self, number: int, retries: int) -> None:
        episode = Episode(self._requests[number], number, self._runner.rules, retries)
        attempt = _Attempt(number, retries, episode, self._runner.sessions.session())
        self._attempts[number] = attempt
        self._act(attempt, episode.start())

    def _act(self, attempt: _Attempt, action: Action) -> None:
        if isinstance(action, Request):
            self._ready[attempt.number] = action
        elif isinstance(action, EpisodeRecord):
            self._end(attempt, action)
        else:
            self._call(attempt, action)

    def _submit(self) -> None:
        """Ask engines for the turns that are ready; with rounds, when all are."""
        if self._config.rounds and (self._calling or self._writing):
            return
        if self._ready:
            # In the order of the requests, whichever environment was the first to answer.
            self._engines.submit(dict(sorted(self._ready.items())))
            self._writing |= self._ready.keys()
            self._ready = {}

    def _completions(self) -> dict[int, Completion]:
        """Turns that are written by now; waits, but never long while environments work."""
        if not self._writing:
            return {}
        try:
            wanted_s = _BRIEF_S if self._calling else POLL_S
            return self._engines.poll(self._patience.of(wanted_s))
        except Exception:
            self._writing.clear()  # engines that have failed take no abort
            raise

    def _call(self, attempt: _Attempt, call: Call) -> None:
        config = self._config
        left = config.trajectory_timeout_s - sum(attempt.calls_s)
        if left <= 0:
            text = f"its calls took environment.trajectory_timeout_s={config.trajectory_timeout_s}"
            self._fail(attempt, Outcome.ENV_TIMEOUT, text)
            return
        self._calling.add(attempt.number)
        attempt.timeout_s, attempt.called_at = min(config.call_timeout_s, left), time.monotonic()
        reply = attempt.session.call(call, attempt.timeout_s)
        # In a thread of the pool, or here where it has ended by now.
        reply.add_done_callback(partial(self._reply_came, attempt))

    def _reply_came(self, attempt: _Attempt, reply: Future[CallResult]) -> None:
        self._replies.put((attempt, reply, time.monotonic()))

    def _take_replies(self) -> None:
        """Go on with the trajectories whose environments have replied; waits if all others wait."""
        while self._calling:
            wait_s = self._patience.of(POLL_S) if self._must_wait() else 0.0
            try:
                with self._named_to_wait_for():
                    attempt, reply, at = self._replies.get(timeout=wait_s)
            except Empty:
                self._check_replies()
                return
            self._calling.remove(attempt.number)
            self._replied_at = time.monotonic()
            result = _result(reply)
            # By the pool's clock: loading the user's file is no part of a call.
            waited = at - attempt.called_at
            attempt.calls_s.append(waited if result.seconds is None else result.seconds)
            self._take_reply(attempt, result)

    def _named_to_wait_for(self) -> AbstractContextManager[None]:
        """Say that these environments are waited for; the deadline is that of the oldest call."""
        calls = [self._attempts[number] for number in sorted(self._calling)]
        rows = [self._requests[call.number].prompt.index for call in calls]
        oldest = min(calls, key=lambda call: call.called_at)
        names = [f"the environment of row {row}" for row in rows]
        return waiting_for(Waited(names, oldest.called_at, oldest.timeout_s))

    def _must_wait(self) -> bool:
        """Whether nothing can go on before an environment replies."""
        can_begin = self._waiting and len(self._attempts) < self._config.max_concurrent
        can_submit = self._ready and not self._config.rounds
        return not (self._writing or can_submit or self._finished or can_begin)

    def _check_replies(self) -> None:
        """EnvironmentFailed where calls have no reply long after all deadlines."""
        # Every call has a deadline, which the pool keeps: some reply comes before this.
        longest_s = self._config.call_timeout_s + STARTUP_S + _MARGIN_S
        since = max(self._replied_at, *(self._attempts[n].called_at for n in self._calling))
        if self._must_wait() and time.monotonic() - since > longest_s:
            raise EnvironmentFailed(self._no_reply(longest_s))

    def _no_reply(self, waited_s: float) -> str:
        prompt = self._requests[min(self._calling)].prompt
        return (
            f"no reply to any of {len(self._calling)} calls of environments for {waited_s:.4g} s, "
            f"the first for row {prompt.index} ({prompt.data_source}), though each should have "
            f"ended within environment.call_timeout_s={self._config.call_timeout_s}: the process "
            "that environments are forked from is stuck; look at its machine, and start again"
        )

    def _take_reply(self, attempt: _Attempt, result: CallResult) -> None:
        if result.ending is Ending.TIMEOUT:
            key = "trajectory_timeout_s, what was left of it"
            if attempt.timeout_s == self._config.call_timeout_s:
                key = "call_timeout_s"
            text = f"no reply within environment.{key}: {attempt.timeout_s:.4g} s"
            self._fail(attempt, Outcome.ENV_TIMEOUT, text)
        elif result.ending is not Ending.VALUE:
            self._fail(attempt, Outcome.ENV_ERROR, result.message)
        else:
            try:
                action = attempt.episode.replied(result.value)
            except OverlongObservation as error:
                self._fail(attempt, Outcome.ENV_ERROR, str(error))
                return
            except OverlongPrompt as error:
                # No failure of the environment, and the same seed would give the same prompt.
                score = Score(0.0, Outcome.OVERLONG_PROMPT, message=str(error))
                self._end(attempt, attempt.episode.record, score)
                return
            self._act(attempt, action)

    def _end(self, attempt: _Attempt, record: EpisodeRecord, failure: Score | None = None) -> None:
        """Hand the trajectory over; its environment is no longer needed."""
        attempt.session.close()
        del self._attempts[attempt.number]
        record = replace(record, calls_s=tuple(attempt.calls_s), retries=attempt.retries)
        ids = list(attempt.episode.last_turn)
        text = self._runner.rules.tokenizer.decode(ids, skip_special_tokens=True)
        self._finished[attempt.number] = Finished(
            attempt.episode.trajectory(), text, record, failure
        )

    def _fail(self, attempt: _Attempt, outcome: Outcome, message: str) -> None:
        """Begin again with a new environment, or give the trajectory up."""
        prompt = self._requests[attempt.number].prompt
        what = f"{outcome.value} in a trajectory of row {prompt.index} ({prompt.data_source})"
        tries = f"attempt {attempt.retries + 1} of {1 + self._config.retries}"
        message = f"{what}, {tries}:\n{message}"
        self._attempts_failed += 1
        if self._attempts_failed <= _LOGGED:
            logging.getLogger(__name__).warning(message)
        if attempt.retries < self._config.retries:
            attempt.session.close()
            self._begin(attempt.number, attempt.retries + 1)
            return
        failure = Score(0.0, outcome, message=message)
        self._failures.append(failure)
        if len(self._failures) == 1:
            self._runner.note(f"{what}, its group is left out: {failure.reason}")
        self._end(attempt, attempt.episode.record, failure)
        check_failures(self._failures, self._config.max_error_rate, self._judged_by)


def check_failures(failures: Sequence[Score], max_error_rate: float, total: int) -> None:
    """EnvironmentFailed where more than `max_error_rate` of `total` trajectories failed.

    One may fail however few there are, unless the rate is 0.
    """
    allowed = int(max_error_rate * total)
    if max_error_rate > 0:
        allowed = max(1, allowed)
    if len(failures) <= allowed:
        return
    raise EnvironmentFailed(
        f"the environments of {len(failures)} of {total} trajectories failed; "
        f"environment.max_error_rate={max_error_rate} allows {allowed}. "
        f"The first:\n{one_screen(failures[0].message or 'no message')}\n"
        f"{remedy(failures)}"
    )


def _result(reply: Future[CallResult]) -> CallResult:
    """What became of a call; EnvironmentFailed where no environment can be started at all."""
    try:
        return reply.result()
    except StartError as error:
        raise EnvironmentFailed(str(error)) from None
    except OSError as error:
        raise EnvironmentFailed(
            f"no process for an environment: {error}; lower environment.max_concurrent"
        ) from error
