"""Engine ranks as threads of this process, without Ray, behind the real `RolloutGroup`.

Invariant: what the driver and the loops of the ranks do is the package's own code; only processes,
Ray's calls and vLLM are stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from ray.exceptions import RayError

from rlhf3d.config.schema import ClusterConfig, RolloutConfig
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.placement import rollout_group, waiting
from rlhf3d.placement.engine_handle import EngineHandle, rank_name
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.script import Script
from rlhf3d.rollout.engine_loop import EngineLoop, Progress
from rlhf3d.rollout.settings import EngineSettings

MAX_MODEL_LEN = 512
_THREADS = 32


class LocalError(RayError):  # type: ignore[misc]
    """What a call raised, as Ray would tell it."""


class _Ray:
    """Ray's waits, on futures."""

    def wait(
        self, calls: Sequence[Future[Any]], num_returns: int, timeout: float
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        if num_returns == 1:
            done, left = wait(calls, timeout, FIRST_COMPLETED)
        else:
            done, left = wait(calls, timeout)
        return list(done), list(left)

    def get(self, call: Future[Any]) -> Any:
        try:
            return call.result()
        except Exception as error:
            raise LocalError(repr(error)) from error


class _Rank:
    """As `EngineRank`."""

    def __init__(self, name: str, engine: Any, timeout_s: float) -> None:
        self._name, self._engine, self._timeout_s = name, engine, timeout_s
        self._loop: EngineLoop

    def rendezvous(self) -> tuple[str, int]:
        return "", 0

    def start_at(self, meeting: Any, timeout_s: float, schedule: Sequence[int]) -> None:
        self._loop = EngineLoop(
            lambda: self._engine,
            rank=0,
            name=self._name,
            timeout_s=self._timeout_s,
            schedule=schedule,
        )

    def call(self, number: int, method: str, args: Sequence[Any], alone: bool) -> Any:
        return self._loop.call(number, method, *args, alone=alone)

    def send(self, number: int, method: str, args: Sequence[Any], alone: bool) -> None:
        self._loop.send(number, method, *args, alone=alone)

    def poll(self, after: int, timeout_s: float) -> Progress:
        return self._loop.poll(after, timeout_s)


class _Actor:
    """Runs a rank's methods in threads, as Ray does."""

    def __init__(self, rank: _Rank, pool: ThreadPoolExecutor) -> None:
        self._rank, self._pool = rank, pool

    def __getattr__(self, method: str) -> Any:
        bound = getattr(self._rank, method)
        return SimpleNamespace(remote=lambda *args: self._pool.submit(bound, *args))


class LocalEngines(RolloutGroup):
    """Engines that `make` makes, one for each number; each has one rank."""

    def __init__(
        self,
        make: Callable[[int], Any],
        engines: int,
        patch: pytest.MonkeyPatch,
        journal: JournalWriter | None = None,
        script: Script | None = None,
        timeout_s: float = 60.0,
        update: Literal["between_batches", "in_flight"] = "between_batches",
    ) -> None:
        patch.setattr(waiting, "ray", _Ray())
        patch.setattr(rollout_group.ray, "kill", lambda actor: None)
        self._make, self._pool = make, ThreadPoolExecutor(_THREADS)
        rollout = RolloutConfig(dtype="float32", enforce_eager=True, engines=engines, update=update)
        nowhere: Any = None
        super().__init__(
            EngineSettings("", rollout, MAX_MODEL_LEN, CPUPlatform("test")),
            replace(ClusterConfig(), phase_timeout_s=timeout_s, startup_timeout_s=20.0),
            nowhere,
            nowhere,
            [[engine] for engine in range(engines)],
            [[1]] * engines,
            None,
            journal,
            script,
        )
        self.wait_ready()

    def _launch(self, engine: int) -> EngineHandle:
        rank = _Rank(rank_name(engine, 0, 1), self._make(engine), self.timeout_s)
        return EngineHandle(engine, [_Actor(rank, self._pool)], self._journal_of(engine))
