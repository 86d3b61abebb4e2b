"""Where a process notes what it does, while a step is profiled.

Invariant: without a profile `span` makes nothing and keeps nothing, so it may stand anywhere; a
span that began before the profile, or goes on after it, is not in it. One recorder a process; spans
are told by the one thread that does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rlhf3d.observability.profile.clock import Clock, HostClock, this_machine
from rlhf3d.observability.profile.operations import Operations, OperationsSettings
from rlhf3d.observability.profile.spans import Kind, Record, RequestLife, Span

_NOTHING = nullcontext()
_recorders: list[Recorder] = []
"""Empty or one."""


@dataclass
class _Life:
    """A request as it goes on; times are stamps."""

    submitted: Any
    prompt_tokens: int
    first_token: Any = None
    ended: Any = None
    tokens: int = 0
    aborted: bool = False


@dataclass
class Recorder:
    """What was noted since a profile began."""

    clock: Clock = field(default_factory=HostClock)
    operations: Operations | None = None
    """torch's own, where they are wanted too."""
    spans: list[tuple[str, Kind, Any, Any, dict[str, Any]]] = field(default_factory=list)
    """Name, kind, stamps of begin and end, details."""
    lives: dict[int, _Life] = field(default_factory=dict)
    """Requests of an engine by number."""

    def __post_init__(self) -> None:
        self.began = self.clock.stamp()

    @contextmanager
    def span(self, name: str, kind: Kind, details: dict[str, Any]) -> Iterator[None]:
        """Note what the body took; also where it raises."""
        traces = self.operations if kind == "call" else None
        if traces is not None:
            traces.begin(name)
        began = self.clock.stamp()
        try:
            yield
        finally:
            self.spans.append((name, kind, began, self.clock.stamp(), details))
            if traces is not None:
                traces.end()

    def submitted(self, number: int, prompt_tokens: int) -> None:
        """A request came."""
        self.lives[number] = _Life(self.clock.stamp(), prompt_tokens)

    def seen(self, number: int, prompt_tokens: int, tokens: int, before: int) -> None:
        """A request has so many tokens after an engine step, and had so many before it."""
        # One that had tokens when the profile began has its first before that; where it did not run
        # then, as after a change of weights, it shows by more tokens than a step gives.
        older = bool(before) or (number not in self.lives and tokens > 1)
        life = self.lives.setdefault(number, _Life(self.began, prompt_tokens))
        if life.first_token is None and tokens:
            life.first_token = self.began if older else self.clock.stamp()
        life.tokens = tokens

    def ended(self, number: int, aborted: bool = False) -> None:
        """A request is done, or not wanted any more."""
        if (life := self.lives.get(number)) is not None:
            life.ended, life.aborted = self.clock.stamp(), aborted

    def record(self) -> Record:
        """All of it, with times."""
        ns = self.clock.ns
        spans = [Span(name, kind, ns(a), ns(b), more) for name, kind, a, b, more in self.spans]
        requests = []
        for number, life in self.lives.items():
            first, end = (None if at is None else ns(at) for at in (life.first_token, life.ended))
            told = (life.prompt_tokens, life.tokens, life.aborted)
            requests.append(RequestLife(number, ns(life.submitted), first, end, *told))
        return Record(this_machine(), tuple(spans), tuple(requests))


def start_recording(
    clock: Clock | None = None, operations: OperationsSettings | None = None
) -> None:
    """Begin to record in this process, from nothing."""
    traces = None if operations is None else Operations(operations)
    _recorders[:] = [Recorder(clock or HostClock(), traces)]


def recorder() -> Recorder | None:
    """This process's, while a step is profiled."""
    return _recorders[0] if _recorders else None


def take_record(began: int = 0) -> Record | None:
    """End the recording; None where there was none, as in a process that was started since.

    `began`: of the step, on this machine's clock, for the traces.
    """
    found, _recorders[:] = recorder(), []
    if found is None:
        return None
    if found.operations is not None:
        found.operations.write(began)
    return found.record()


def span(name: str, kind: Kind, **details: Any) -> AbstractContextManager[None]:
    """Note what the body takes, while a step is profiled."""
    return _recorders[0].span(name, kind, details) if _recorders else _NOTHING
