"""Spans of what Megatron does: its timers, told to a recorder.

Invariant: forward and backward spans carry the micro-batch and model chunk that the schedule has in
that place. Megatron starts and stops a timer by name around each part of its schedule, gradient
reduction and optimizer step, where its configuration holds a function that gives timers.
Runs in: training rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf3d.observability.profile.recorder import Recorder
from rlhf3d.observability.profile.spans import Kind

KINDS: dict[str, tuple[str, Kind]] = {
    "forward-backward": ("pipeline", "schedule"),
    "forward-compute": ("forward", "forward"),
    "backward-compute": ("backward", "backward"),
    "all-grads-sync": ("reduce gradients", "collective"),
    "embedding-grads-all-reduce": ("reduce embedding gradients", "collective"),
    "params-all-gather": ("gather weights", "collective"),
}
"""Megatron's timers that become spans, besides those of messages; others are inside one of these,
or take no time here."""
_MESSAGES = ("-send", "-recv")
_MESSAGE: tuple[str, Kind] = ("wait for a stage", "wait")

Schedule = Sequence[tuple[int, int]]
"""(micro-batch, model chunk) of each forward pass, in order."""


class SpanTimers:
    """What `config.timers` of Megatron's configurations is while a step is profiled."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._running: dict[str, _Timer] = {}
        self._order: dict[str, Schedule] = {}
        self._tokens: Sequence[int] = ()
        self._passes: dict[str, int] = {}
        """Forward and backward passes since the schedule began."""

    def run(self, schedule: Schedule, chunks: int, tokens: Sequence[int]) -> None:
        """A schedule begins; `tokens`: of each micro-batch, padding included."""
        backward = [(micro, chunks - 1 - chunk) for micro, chunk in schedule]
        self._order = {"forward-compute": schedule, "backward-compute": backward}
        self._tokens, self._passes = tokens, dict.fromkeys(self._order, 0)

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """Megatron asks by name each time it starts or stops one."""
        if name not in self._running:
            self._running[name] = _Timer(self, name)
        return self._running[name]

    def note(self, name: str, began: Any) -> None:
        """A timer has stopped."""
        details: dict[str, Any] = {}
        if name in self._order:
            micro, chunk = self._order[name][self._passes[name]]
            self._passes[name] += 1
            details = {"micro_batch": micro, "chunk": chunk, "tokens": self._tokens[micro]}
        elif name.endswith(_MESSAGES):
            details = {"message": name}
        label = _MESSAGE if name.endswith(_MESSAGES) else KINDS.get(name)
        if label is not None:
            stamps = (began, self._recorder.clock.stamp())
            self._recorder.spans.append((*label, *stamps, details))
            if self._recorder.operations is not None:
                self._recorder.operations.look()

    def stamp(self) -> Any:
        """Of now."""
        return self._recorder.clock.stamp()


class _Timer:
    """One of them."""

    def __init__(self, timers: SpanTimers, name: str) -> None:
        self._timers, self._name = timers, name
        self._began: Any = None

    def start(self, barrier: bool = False) -> None:
        """`barrier`: Megatron would have all ranks begin at once; who is late is to be seen."""
        self._began = self._timers.stamp()

    def stop(self, barrier: bool = False) -> None:
        """Note the span."""
        self._timers.note(self._name, self._began)
