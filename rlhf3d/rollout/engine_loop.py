"""The loop of an engine rank: it steps while requests are unfinished, and takes commands between.

Invariant: every rank of an engine applies the same commands, in the order of their numbers, before
the same engine step; no step is taken while weights are loaded and not published; and one thread
alone touches the engine, which starts in it: threads have their own number of OpenMP threads and
their own CUDA device.

Commands reach the ranks one by one and at different times. Before each step rank 0 says up to which
number it has them, and the others wait for theirs. An engine without requests says nothing: each
rank waits for its next command.

An engine's numbers depend on which command came before which step, and that on the time. Rank 0
tells it (`Progress.applied`), and a loop that is given such a schedule repeats it.
Pure: no vLLM, no Ray.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rlhf3d.observability.profile.recorder import span
from rlhf3d.rollout.api import PART_S, Completion, Request

R = TypeVar("R")

ENDS = "close"
"""The command after which the loop ends."""
DUE = "is due after step"
"""In what is raised where a command of the schedule does not come in time."""


class SteppedEngine(Protocol):
    """What the loop drives; commands are its methods by name."""

    @property
    def unfinished(self) -> bool:
        """Whether requests are being worked on."""

    @property
    def can_step(self) -> bool:
        """Whether a step can be taken: requests are unfinished, and weights are published.

        From an update of the weights until they are published, running requests wait.
        """

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`."""

    def step(self) -> dict[int, Completion]:
        """Take one engine step; the completions that finished in it, by number."""

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""

    def agree(self, number: int, timeout_s: float) -> int:
        """Rank 0's number, on every rank; each rank asks at the same points."""


@dataclass(frozen=True)
class Progress:
    """What a rank has done since it was asked before."""

    completions: dict[int, Completion]
    """Those that finished, by number; none on ranks after the first."""
    steps: int
    """Engine steps since the start."""
    idle: bool
    """Whether nothing is unfinished."""
    applied: tuple[tuple[int, int], ...] = ()
    """Commands that were applied: number, and engine steps taken before it; none on ranks after
    the first, which apply them before the same steps."""


@dataclass(frozen=True)
class _Command:
    method: str
    args: tuple[Any, ...]
    result: Future[Any] | None
    """None where nobody waits: what goes wrong in it ends the loop."""
    alone: bool = False
    """See `EngineLoop.send`."""


class EngineLoop:
    """One rank's loop, in a thread of its own."""

    def __init__(
        self,
        start: Callable[[], SteppedEngine],
        *,
        rank: int,
        name: str,
        timeout_s: float,
        schedule: Sequence[int] = (),
    ) -> None:
        """Begin to `start` the engine in the loop's thread; `wait_started` waits for that.

        `name`, of the rank, is for messages. `timeout_s`: how long this rank waits for what another
        rank, or the driver, has to tell it. `schedule`: to repeat an earlier run, the engine steps
        that were taken before each of its commands, the same on every rank; commands after the last
        one of it come when they come.
        """
        self._start, self._leads, self._name = start, rank == 0, name
        self._timeout_s, self._schedule = timeout_s, schedule
        self._started: Future[None] = Future()
        # Guards what follows, and is notified when it changes; not held while the engine works.
        self._changed = threading.Condition()
        self._commands: dict[int, _Command] = {}
        """Those that came and were not applied, by number."""
        self._applied = 0
        """Number of the last one that was applied; they count from 1."""
        self._applied_at: list[tuple[int, int]] = []
        """See `Progress.applied`: what nobody was told yet."""
        self._done: dict[int, Completion] = {}
        """Completions that nobody has taken yet."""
        self._handed_out_at = 0.0
        self._steps = 0
        self._busy = self._closed = False
        self._failure: Exception | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def wait_started(self, timeout_s: float) -> None:
        """Wait until the engine has started. Raises what its start raised."""
        self._result(self._started, timeout_s, "its start")

    def send(self, number: int, method: str, *args: Any, alone: bool = False) -> None:
        """Have command `number` applied, in its turn; what goes wrong in it ends the loop.

        `alone`: not before the engine has no requests any more.
        """
        self._put(number, _Command(method, args, None, alone))

    def call(self, number: int, method: str, *args: Any, alone: bool = False) -> Any:
        """Have command `number` applied, as by `send`; its result. Raises what it raises."""
        result: Future[Any] = Future()
        self._put(number, _Command(method, args, result, alone))
        return self._result(result, self._timeout_s, f"{method} (command {number})")

    def _result(self, result: Future[R], timeout_s: float, what: str) -> R:
        try:
            return result.result(timeout_s)
        except TimeoutError:
            # A TimeoutError that was raised inside is its result, and not this wait's.
            if result.done():
                raise
            raise TimeoutError(
                f"{self._name}: {what} did not end within {timeout_s:.0f} s, after "
                f"{self._applied} commands"
            ) from None

    def poll(self, after: int, timeout_s: float) -> Progress:
        """What finished since the last poll.

        Waits up to `timeout_s` for the first completion, or until nothing is unfinished once
        command `after` was applied. Raises what ended the loop, if that happened.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                now = time.monotonic()
                # Of a closed one no more will come, whatever it was at.
                idle = self._closed or (self._applied >= after and not self._busy)
                # Of a busy engine a part every PART_S; the last ones at once.
                due = self._handed_out_at + PART_S if self._done else deadline
                if idle or now >= min(due, deadline):
                    break
                self._changed.wait(min(due, deadline) - now)
            if self._done:
                self._handed_out_at = now
            done, self._done = self._done, {}
            applied, self._applied_at = tuple(self._applied_at), []
            return Progress(done, self._steps, idle, applied)

    def _put(self, number: int, command: _Command) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            assert number > self._applied and number not in self._commands, "commands are numbered"
            self._commands[number] = command
            self._changed.notify_all()

    def _run(self) -> None:
        """The thread."""
        try:
            engine = self._start()
            self._started.set_result(None)
            while not self._closed:
                self._turn(engine)
        except Exception as error:
            self._fail(error)

    def _turn(self, engine: SteppedEngine) -> None:
        """Apply the commands that have come, then take a step."""
        if not engine.can_step:
            self._wait_for_a_command()
        if self._leads:
            self._wait_for_the_due(engine.can_step)
        # How far this rank would go counts only on rank 0.
        upto = engine.agree(self._goes_upto(engine.unfinished), self._timeout_s)
        assert upto > self._applied or engine.can_step, (
            "a command waits until all requests are done, and they wait for weights"
        )
        while self._applied < upto and not self._closed:
            self._apply(engine, self._next_command())
        # Where the schedule has more before this step, another turn comes first. A closed engine
        # may have requests left, which it cannot work on.
        if engine.can_step and not self._closed and self._next_due() != self._steps:
            completions = engine.step()
            with self._changed:
                self._steps += 1
                self._done |= completions
                self._busy = engine.unfinished
                if completions or not self._busy:
                    self._changed.notify_all()

    def _wait_for_a_command(self) -> None:
        """Wait for the next one: nothing is to be done until then, however long that is."""
        with self._changed:
            while self._applied + 1 not in self._commands:
                self._changed.wait()

    def _goes_upto(self, unfinished: bool) -> int:
        """The last command before which none is missing, and none must wait."""
        with self._changed:
            number = first = self._applied + 1
            while command := self._commands.get(number):
                if number <= len(self._schedule):
                    # The end comes whenever it comes: perhaps not all of the run is repeated.
                    waits = self._schedule[number - 1] > self._steps and command.method != ENDS
                else:
                    waits = command.alone and (unfinished or number > first)
                if waits:
                    break
                number += 1
            return number - 1

    def _next_due(self) -> int | None:
        """After how many steps the schedule has the next command; None where it says nothing."""
        return self._schedule[self._applied] if self._applied < len(self._schedule) else None

    def _wait_for_the_due(self, can_step: bool) -> None:
        """Rank 0: where the schedule has a command before the next step, wait until it has come."""
        number, due = self._applied + 1, self._next_due()
        if due == self._steps and can_step:
            which = f"which {DUE} {due}"
            self._command(number, time.monotonic() + self._timeout_s, which)
        elif due is not None and due != self._steps and not can_step:
            raise RuntimeError(
                f"{self._name}: command {number} {DUE} {due}, but nothing is left to "
                f"do after step {self._steps}: this is not the run that the schedule is of"
            )

    def _next_command(self) -> _Command:
        """The one that rank 0 has already, when it has come here too."""
        number, deadline = self._applied + 1, time.monotonic() + self._timeout_s
        command = self._command(number, deadline, "which rank 0 of the engine has")
        with self._changed:
            del self._commands[number]
        return command

    def _command(self, number: int, deadline: float, which: str) -> _Command:
        """A command, once it has come; TimeoutError at the deadline."""
        with self._changed:
            while number not in self._commands:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(
                        f"{self._name}: command {number}, {which}, did not come here within "
                        f"{self._timeout_s:.0f} s"
                    )
                self._changed.wait(left_s)
            return self._commands[number]

    def _apply(self, engine: SteppedEngine, command: _Command) -> None:
        value: Any = None
        error: Exception | None = None
        try:
            with span(command.method, "command"):
                value = getattr(engine, command.method)(*command.args)
        except Exception as raised:
            if command.result is None:
                raise
            error = raised
        with self._changed:
            self._applied += 1
            if self._leads:
                self._applied_at.append((self._applied, self._steps))
            self._busy = engine.unfinished
            if command.method == "abort":
                for number in command.args[0]:
                    self._done.pop(number, None)
            self._closed = command.method == ENDS
            self._changed.notify_all()
        # After the state above, which whoever gets the result may ask for.
        if command.result is not None and error is not None:
            command.result.set_exception(error)
        elif command.result is not None:
            command.result.set_result(value)

    def _fail(self, error: Exception) -> None:
        """Give everybody who waits, or asks later, what ended the loop."""
        with self._changed:
            self._failure = error
            commands, self._commands = self._commands, {}
            self._changed.notify_all()
        if not self._started.done():
            self._started.set_exception(error)
        for command in commands.values():
            if command.result is not None:
                command.result.set_exception(error)
