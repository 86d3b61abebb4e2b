"""What engines have to be told, and when, for a run to be the one that a journal is of.

Invariant: each engine is told what the run told it, in the same order; requests are held until all
of a command's have come, whenever that is. What is not the run's raises Divergence, with the first
difference.
No Ray, no vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rlhf3d.placement.journal import Command, Made, Segment, asked, trajectory_of
from rlhf3d.rollout.api import Request
from rlhf3d.units import some

CAUSES = (
    "What usually does this: an environment, tool or reward that does not depend on its seed and "
    "input alone (time, network, a deadline that was missed), data or code changed since, other "
    "library versions, or another kind of processor."
)


class Divergence(RuntimeError):
    """What runs here is not the run of the journal."""

    def __init__(self, what: str) -> None:
        super().__init__(f"this is not the run of the journal: {what}.\n{CAUSES}")


class EndOfScript(Exception):
    """All steps that were to be repeated are."""


class Script:
    """A part of a run, to be repeated up to a step."""

    def __init__(self, segment: Segment, until: int | None = None) -> None:
        """`until`: the last step; None for the last one that the journal has."""
        self.begin, self.until = segment.begin, segment.last_step if until is None else until
        self.facts = segment.facts
        self._steps, self._schedules = segment.steps, segment.schedules
        self._ended_before = segment.ended
        self._commands = segment.commands
        self._sent = dict.fromkeys(segment.commands, 0)
        """How many commands each engine has been told."""
        self._places: dict[str, deque[tuple[int, int, int]]] = {}
        """By name of a request: engine, command and place in it, in the order of time."""
        for engine, commands in segment.commands.items():
            for number, command in enumerate(commands):
                for place, request in enumerate(command.requests):
                    self._places.setdefault(request.name, deque()).append((engine, number, place))
        self._turns: dict[str, list[str]] = {}
        """Names of requests by trajectory."""
        for name in self._places:
            self._turns.setdefault(trajectory_of(name), []).append(name)
        self._held: dict[tuple[int, int], dict[int, tuple[int, Request]]] = {}
        """By engine and command, the requests that have come, by their place."""
        self._beyond: list[str] = []
        """Requests that the journal does not have: they would come later."""
        self._own: dict[str, int] = {}
        """Numbers of requests that were sent, by name."""
        self._over: set[int] = set()
        """Numbers of those that were completed or dropped."""
        self._made = {name: deque(made) for name, made in segment.made.items()}
        self._trained = segment.begin
        self._step_of: dict[str, int] = {}
        """That trained on a trajectory: of these the journal has all requests."""
        for step, names in segment.steps.items():
            self._step_of |= dict.fromkeys(names, step)

    @property
    def began(self) -> datetime:
        """The time that chat templates were told."""
        return datetime.fromisoformat(self.facts["began"])

    @property
    def engines(self) -> int:
        """How many the run had."""
        return len(self._commands)

    def schedule(self, engine: int) -> Sequence[int]:
        """The steps that an engine takes before each of its commands."""
        return self._schedules.get(engine, [])

    def trajectories(self, step: int) -> tuple[str, ...]:
        """Those that a step trains on, in their order; EndOfScript after the last step."""
        if step > self.until or step not in self._steps:
            raise EndOfScript
        return self._steps[step]

    def groups_ended(self, step: int) -> tuple[int, ...]:
        """Groups that came to their end between a step and the one before, in order."""
        return self._ended_before[step]

    def trained(self, step: int, names: Sequence[str]) -> None:
        """A step is complete, and trained on these trajectories."""
        run = self._steps[step]
        if tuple(names) != run:
            here, there = (some(sorted(set(a) - set(b))) for a, b in ((names, run), (run, names)))
            what = f"{here or 'no others'}, in the run {there or 'in another order'}"
            raise Divergence(f"step {step} trained on {what}")
        self._trained = step

    def ended(self, trajectory: str) -> None:
        """A trajectory has come to its end. Raises Divergence where the run asked for more of it.

        Without it, an engine would wait for that until its deadline.
        """
        for name in self._turns.get(trajectory, ()):
            if places := self._places[name]:
                when = self._when(*places[0][:2])
                raise Divergence(f"{trajectory} has ended, and in the run {name} followed ({when})")

    def not_trained(self, trajectories: Iterable[str]) -> None:
        """A group is not to be trained on. Raises Divergence where a repeated step has done so.

        Without it, the step would wait for that group for ever.
        """
        for name in trajectories:
            if (step := self._step_of.get(name, self.until + 1)) <= self.until:
                raise Divergence(
                    f"{name} is not to be trained on (its group failed, or its rewards do not "
                    f"differ), and in the run step {step} trained on it"
                )

    def check_end(self) -> None:
        """Raise EndOfScript where the steps are complete and the journal says nothing more.

        A run that was stopped has not written down what came after.
        """
        ended = all(self._next(engine) is None for engine in self._commands)
        if ended and self._trained >= self.until:
            raise EndOfScript

    def hold(self, own: int, request: Request) -> None:
        """A request has come, which engines know by `own`."""
        here = asked(request)
        places = self._places.get(here.name)
        if not places:
            # Of others it is not known what followed the end of the journal.
            if trajectory_of(here.name) in self._step_of:
                raise Divergence(f"request {here.name} is none of the run's, which has its others")
            self._beyond.append(here.name)
            return
        engine, number, place = places.popleft()
        run = self._commands[engine][number].requests[place]
        if run != here:
            if run.seed != here.seed:
                what = f"its seed is {here.seed}, in the run {run.seed}"
            elif run.tokens != here.tokens:
                what = f"its prompt has {here.tokens} tokens, in the run {run.tokens}"
            else:
                what = f"its prompt of {here.tokens} tokens is another than in the run"
            raise Divergence(f"request {here.name} ({self._when(engine, number)}): {what}")
        self._held.setdefault((engine, number), {})[place] = (own, request)

    def drop(self, own: int) -> None:
        """A request is not wanted any more: the run has an abort for it, or it was completed."""
        self._over.add(own)

    def completed(self, engine: int, made: Iterable[Made]) -> None:
        """Compare what an engine has completed with what it did in the run."""
        for here in made:
            self._over.add(self._own[here.name])
            expected = self._made.get(here.name)
            if not expected:
                continue  # in the run it had not come before the journal ends
            run = expected.popleft()
            if run.tokens != here.tokens:
                what = f"{here.tokens} tokens, in the run {run.tokens}"
            elif run != here:
                what = f"{here.tokens} tokens as in the run, but not the same ones or log-probs"
            else:
                continue
            raise Divergence(f"the completion of {here.name} (engine {engine}) has {what}")

    def next_of_requests(self, engine: int) -> Mapping[int, Request] | list[int] | None:
        """What to tell an engine now: requests to submit, or numbers of requests to abort.

        None where the next command is the trainer's, or is not complete.
        """
        command = self._next(engine)
        if command is None:
            return None
        given: Mapping[int, Request] | list[int]
        if command.method == "submit":
            held = self._held.get((engine, self._sent[engine]), {})
            if len(held) < len(command.requests):
                return None
            given = dict(one for _, one in sorted(held.items(), key=lambda item: item[0]))
            names = (request.name for request in command.requests)
            self._own |= zip(names, given, strict=True)
            del self._held[engine, self._sent[engine]]
        elif command.method == "abort":
            given = [self._own[name] for name in command.names]
            if not self._over.issuperset(given):
                return None
        else:
            return None
        self._sent[engine] += 1
        return given

    def waits_for_requests(self, engine: int) -> bool:
        """Whether something about requests comes before the trainer's next command."""
        command = self._next(engine)
        return command is not None and command.method in ("submit", "abort")

    def tell(self, engine: int, method: str, args: Sequence[object]) -> None:
        """The trainer tells an engine something. Raises Divergence where it is not its turn."""
        run = self._next(engine)
        if run is None:
            return
        version = args[0] if run.version is not None and args else None
        if run.method != method or run.version != version:
            when = self._when(engine, self._sent[engine])
            here, there = _called(method, version), _called(run.method, run.version)
            raise Divergence(f"the engine is told {here}, in the run {there} ({when})")
        self._sent[engine] += 1

    def lacks(self) -> str:
        """What engines wait for, and what came instead."""
        lines = []
        for engine in self._commands:
            command, number = self._next(engine), self._sent[engine]
            if command is None:
                continue
            names = [name.name for name in command.requests] or list(command.names)
            held = self._held.get((engine, number), {})
            missing = [name for place, name in enumerate(names) if place not in held]
            wanted = f": {some(missing)}" if missing else ""
            lines.append(f"{command.method} did not come ({self._when(engine, number)}){wanted}")
        if self._beyond:
            lines.append(f"requests that the run has not: {some(self._beyond)}")
        return "; ".join(lines)

    def _next(self, engine: int) -> Command | None:
        """What an engine is told next; None after the end of the journal."""
        commands, sent = self._commands[engine], self._sent[engine]
        return commands[sent] if sent < len(commands) else None

    def _when(self, engine: int, number: int) -> str:
        """Of a command, counted from 0."""
        return f"engine {engine}, after step {self._schedules[engine][number]}"


def _called(method: str, version: object) -> str:
    return method if version is None else f"{method} of policy {version}"
