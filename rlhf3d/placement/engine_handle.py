"""One engine as the driver sees it: commands to all of its ranks, and what comes back.

Invariant: every rank gets the same commands with the same numbers.
Runs in: driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple

from rlhf3d.placement.calls import Reply, start_call
from rlhf3d.placement.engine_rank import EngineRank
from rlhf3d.placement.journal import EngineJournal
from rlhf3d.placement.waiting import WorkerFailure
from rlhf3d.rollout.api import Completion
from rlhf3d.rollout.engine_loop import Progress
from rlhf3d.rollout.vllm_engine import VLLMEngine

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

ANSWER_S = 5.0
"""Seconds within which a busy rank tells that it is still at work."""


def rank_name(engine: int, rank: int, ranks: int) -> str:
    """What an engine's rank is called in messages and logs."""
    return f"engine {engine}" if ranks == 1 else f"engine {engine} rank {rank}"


class EngineHandle:
    """The actors of one engine's ranks."""

    def __init__(
        self, number: int, actors: Sequence[Any], journal: EngineJournal | None = None
    ) -> None:
        """`journal`: where it is written what the engine does, and when."""
        self.number, self.actors, self._journal = number, list(actors), journal
        ranks = len(self.actors)
        self.names = [rank_name(number, rank, ranks) for rank in range(ranks)]
        """Of the ranks, in messages."""
        self._commands = 0
        self._asked: set[str] = set()
        """Ranks that have a call to tell what they did."""
        self._steps = -1
        self.moved_at = time.monotonic()
        """When it last took a step, or got something to do."""

    def call(
        self, method: Callable[[VLLMEngine, *Ts], R], *args: *Ts, alone: bool = False
    ) -> dict[str, Reply[R]]:
        """Start a command on every rank, by the rank's name.

        `alone`: it is not applied before the engine has no requests any more.
        """
        self._count(method.__name__, args)
        return {
            name: start_call(actor, EngineRank.call, self._commands, method.__name__, args, alone)
            for name, actor in self.ranks()
        }

    def send(self, method: Callable[[VLLMEngine, *Ts], None], *args: *Ts, alone: bool) -> None:
        """Send a command to every rank, as `call`; what goes wrong in it, `ask` tells."""
        self._count(method.__name__, args)
        for _, actor in self.ranks():
            start_call(actor, EngineRank.send, self._commands, method.__name__, args, alone)

    def _count(self, method: str, args: Sequence[Any]) -> None:
        self._commands += 1
        if self._journal is not None:
            self._journal.sent(self._commands, method, args)

    def ask(self) -> dict[str, Reply[Progress]]:
        """Have the ranks tell what they do, those that are not asked already.

        All of them: where one fails, the others only lose their peer.
        """
        calls = {
            name: start_call(actor, EngineRank.poll, self._commands, ANSWER_S)
            for name, actor in self.ranks()
            if name not in self._asked
        }
        self._asked |= set(calls)
        return calls

    def told(self, name: str, progress: Progress) -> dict[int, Completion]:
        """Take what a rank has told; its completions."""
        self._asked.remove(name)
        if name == self.names[0] and progress.steps > self._steps:
            self._steps = progress.steps
            self.excuse()
        if name == self.names[0] and self._journal is not None:
            self._journal.told(progress)
        return progress.completions

    def excuse(self, seconds: float | None = None) -> None:
        """Count the time without progress from now on, or leave `seconds` of it out."""
        now = time.monotonic()
        self.moved_at = now if seconds is None else min(now, self.moved_at + seconds)

    def check_progress(self, unfinished: int, timeout_s: float) -> None:
        """Raise WorkerFailure where the engine has not stepped for `timeout_s`."""
        if time.monotonic() - self.moved_at <= timeout_s:
            return
        late = WorkerFailure(
            f"generate: engine {self.number} has {unfinished} unfinished requests and took no step "
            f"within {timeout_s:.0f} s; raise cluster.phase_timeout_s if a step is really that "
            "long, or look into logs/"
        )
        late.lost_touch = True
        raise late

    def ranks(self) -> list[tuple[str, Any]]:
        """Name and actor of each rank."""
        return list(zip(self.names, self.actors, strict=True))
