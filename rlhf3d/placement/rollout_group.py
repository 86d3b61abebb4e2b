"""The vLLM engines as the driver sees them: requests in, completions out as they finish.

Invariant: all engines serve the same `policy_version`; none serves before it was synced and
published.
Runs in: driver; `EngineRank` in the engine ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar, TypeVarTuple

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf3d.config.schema import ClusterConfig
from rlhf3d.observability.live.state import Waited
from rlhf3d.observability.live.waits import waiting_for
from rlhf3d.placement.calls import Reply, start_call
from rlhf3d.placement.cluster import has_its_nodes
from rlhf3d.placement.engine_handle import EngineHandle, rank_name
from rlhf3d.placement.engine_rank import CALLS, EngineRank
from rlhf3d.placement.journal import EngineJournal, JournalWriter
from rlhf3d.placement.ledger import Ledger
from rlhf3d.placement.resources import Placement, starts_with
from rlhf3d.placement.routing import Router
from rlhf3d.placement.script import Divergence, Script
from rlhf3d.placement.waiting import (
    SHORT_S,
    WorkerFailure,
    dead_actors,
    gather,
    take_ready,
)
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import Completion, Request, SyncReport
from rlhf3d.rollout.engine_loop import DUE, Progress
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

CLOSE_S = 60.0


@dataclass(frozen=True)
class _Unfinished:
    """A request that an engine has."""

    number: int
    """The caller's."""
    engine: int


class RolloutGroup:
    """The engines of a run, each with the processes of its tensor-parallel ranks."""

    def __init__(
        self,
        settings: EngineSettings,
        cluster: ClusterConfig,
        placement: Placement,
        reserved: PlacementGroup,
        bundles: Sequence[Sequence[int]],
        threads: Sequence[Sequence[int]],
        output_dir: str | None = None,
        journal: JournalWriter | None = None,
        script: Script | None = None,
    ) -> None:
        """Begin to start the engines, which `wait_ready` ends.

        By engine and rank, `bundles` says where they run and `threads` with how many CPU threads.
        `journal`: where it is written what they do, and when. `script`: what they are to repeat.
        """
        self.timeout_s = cluster.phase_timeout_s
        self.startup_timeout_s = cluster.startup_timeout_s
        self._max_model_len = settings.max_model_len
        self._output_dir, self._journal, self.script = output_dir, journal, script
        self.meanwhile: Callable[[], bool] | None = None
        """What goes on while requests are waited for that the script has next; see `gather`."""
        self._held: dict[int, int] = {}
        """Requests that the script has for later: the caller's number by the engines'."""
        self._held_up_s = 0.0
        """Seconds waited for them alone, since the script had something for an engine."""
        self._settings, self._placement, self._reserved = settings, placement, reserved
        self._bundles, self._threads = bundles, threads
        self._in_flight = settings.rollout.update == "in_flight"
        # With its folder's own weights an engine serves from its start.
        self._served = settings.load_weights
        self._router = Router(len(bundles))
        self._ids = count()
        self._unfinished: dict[int, _Unfinished] = {}
        """By the number that engines know a request by: the caller's may come again."""
        self._ledger = Ledger(len(bundles))
        self._published: int | None = None
        """The version that the engines were given last."""
        self._behind = False
        """Whether engines may be at requests that they were given again, answered or not."""
        self._left_at = time.monotonic()
        self._start_processes()

    def _start_processes(self) -> None:
        """Begin to start every engine."""
        self._new = True
        """Whether they have had nothing to do yet."""
        self._asked: dict[str, Reply[Progress]] = {}
        """By rank, the calls in which busy engines tell what they do."""
        self.engines = [self._launch(engine) for engine in range(len(self._bundles))]
        # By now all processes are starting at once; an engine meets where its rank 0 listens.
        firsts = {
            engine.names[0]: start_call(engine.actors[0], EngineRank.rendezvous)
            for engine in self.engines
        }
        meetings = gather("start vLLM", firsts, self.startup_timeout_s)
        self._starting: dict[str, Reply[None]] = {}
        for engine, meeting in zip(self.engines, meetings, strict=True):
            for name, actor in zip(engine.names, engine.actors, strict=True):
                self._starting[name] = start_call(
                    actor,
                    EngineRank.start_at,
                    meeting,
                    self.startup_timeout_s,
                    () if self.script is None else self.script.schedule(engine.number),
                )

    def wait_ready(self) -> None:
        """Wait until every engine can take requests."""
        gather("start vLLM", self._starting, self.startup_timeout_s)

    def _launch(self, engine: int) -> EngineHandle:
        """Start the processes of an engine; vLLM starts in them once they know where to meet."""
        settings = self._settings
        environment = settings.platform.environment("engine", settings.rollout.dtype)
        options = self._placement.options["engine"] | starts_with(environment)
        ranks = len(self._bundles[engine])
        actors = []
        for rank in range(ranks):
            own, bundle = self._threads[engine][rank], self._bundles[engine][rank]
            actor = ray.remote(EngineRank).options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._reserved, bundle),
                max_concurrency=CALLS,
                **options,
            )
            name = rank_name(engine, rank, ranks)
            actors.append(actor.remote(name, settings, rank, own, self.timeout_s, self._output_dir))
        return EngineHandle(engine, actors, self._journal_of(engine))

    def _journal_of(self, engine: int) -> EngineJournal | None:
        """Where it is written what an engine does; compared with the script, if there is one."""
        if self._journal is None:
            assert self.script is None, "the journal names what is compared"
            return None
        if self.script is None:
            return EngineJournal(self._journal, engine)
        return EngineJournal(self._journal, engine, partial(self.script.completed, engine))

    def _start_all(self, method: Callable[[VLLMEngine, *Ts], R], *args: *Ts) -> dict[str, Reply[R]]:
        """Start the same command on every rank of every engine."""
        self._await_turn()
        calls: dict[str, Reply[R]] = {}
        for engine in self.engines:
            calls |= self._call(engine, method, *args)
        return calls

    def _call(
        self, engine: EngineHandle, method: Callable[[VLLMEngine, *Ts], R], *args: *Ts
    ) -> dict[str, Reply[R]]:
        """Start a command on every rank of an engine; the script must have it next."""
        if self.script is not None:
            self._held_up_s = 0.0
            self.script.tell(engine.number, method.__name__, args)
        return engine.call(method, *args)

    def _await_turn(self) -> None:
        """Wait until the script has nothing about requests before the trainer's next command."""
        script, deadline = self.script, time.monotonic() + self.timeout_s
        if script is None:
            return
        while any(script.waits_for_requests(engine.number) for engine in self.engines):
            if self.meanwhile is None or not self.meanwhile():
                time.sleep(SHORT_S)
            if time.monotonic() > deadline:
                raise Divergence(f"after {self.timeout_s:.0f} s {script.lacks()}")

    def _on_all(self, phase: str, method: Callable[[VLLMEngine, *Ts], R], *args: *Ts) -> list[R]:
        """Have every rank apply a command; the results of the engines' first ranks."""
        calls = self._start_all(method, *args)
        results = dict(zip(calls, gather(phase, calls, self.timeout_s), strict=True))
        return [results[engine.names[0]] for engine in self.engines]

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`; a request goes to the engine that `Router` chooses."""
        if not self._served:
            raise RuntimeError("no policy is published: weights must be synced before requests")
        for request in requests.values():
            request.check_fits(self._max_model_len)
        if self.script is not None:
            for number, request in requests.items():
                own = next(self._ids)
                self._held[own] = number
                self.script.hold(own, request)
            self._follow(self.script)
            return
        of_engine: dict[int, dict[int, Request]] = {}
        for number, request in requests.items():
            engine, own = self._router.route(request), next(self._ids)
            self._unfinished[own] = _Unfinished(number, engine)
            of_engine.setdefault(engine, {})[own] = request
        for engine, given in of_engine.items():
            idle = self._router.unfinished[engine] == len(given)
            self._ledger.add(engine, given, idle)
            self._give(engine, given, idle)

    def _give(self, engine: int, requests: dict[int, Request], idle: bool) -> None:
        handle = self.engines[engine]
        if idle:  # it had nothing to do: its time begins now
            handle.excuse()
        # Alone: an engine that was started again may still be at what it was given before.
        handle.send(VLLMEngine.submit, requests, alone=idle)

    def _follow(self, script: Script) -> None:
        """Tell engines what the script has next about requests, as far as all of it has come."""
        for engine in self.engines:
            while (given := script.next_of_requests(engine.number)) is not None:
                self._held_up_s = 0.0
                if isinstance(given, list):
                    engine.send(VLLMEngine.abort, given, alone=False)
                    continue
                for own in given.keys() & self._held.keys():
                    self._unfinished[own] = _Unfinished(self._held.pop(own), engine.number)
                    self._router.unfinished[engine.number] += 1
                engine.excuse()
                engine.send(VLLMEngine.submit, dict(given), alone=False)

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """See `Engines.poll`.

        Raises WorkerFailure for an engine that failed, or has requests and takes no step within
        `phase_timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        # An engine does not tell what it does while nobody asks.
        away_s = time.monotonic() - self._left_at
        for engine in self.engines:
            engine.excuse(away_s)
        completions: dict[int, Completion] = {}
        with self._named_to_wait_for():
            while self._unfinished and not completions:
                left_s = deadline - time.monotonic()
                try:
                    completions = self._collect(max(0.0, left_s))
                except WorkerFailure as failure:
                    if self.script is not None and DUE in str(failure):
                        raise Divergence(f"{self.script.lacks()}\n{failure}") from failure
                    raise
                if left_s <= 0:
                    break
        if self.script is not None:
            self._follow(self.script)
            if not completions and not self._unfinished and self._held:
                self.script.check_end()
                self._wait_for_script(self.script, min(timeout_s, SHORT_S))
        self._left_at = time.monotonic()
        return completions

    def _named_to_wait_for(self) -> AbstractContextManager[None]:
        """Say that engines with unfinished requests are waited for, until each takes a step."""
        busy = {engine: self._router.unfinished[engine.number] for engine in self.engines}
        busy = {engine: unfinished for engine, unfinished in busy.items() if unfinished}
        names = [f"engine {one.number} ({unfinished} requests)" for one, unfinished in busy.items()]
        since = min((engine.moved_at for engine in busy), default=time.monotonic())
        return waiting_for(Waited(names, since, self.timeout_s))

    def _wait_for_script(self, script: Script, seconds: float) -> None:
        """Wait where engines have nothing that could be waited for, but not for ever.

        The trainer may have the script's next command, but not while it waits for these requests.
        """
        time.sleep(seconds)
        self._held_up_s += seconds
        if self._held_up_s > self.timeout_s:
            raise Divergence(f"after {self.timeout_s:.0f} s {script.lacks()}")

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""
        if self.script is not None:
            self._drop(self.script, numbers)
            return
        of_engine: dict[int, list[int]] = {}
        for own, request in self._unfinished.items():
            if request.number in numbers:
                of_engine.setdefault(request.engine, []).append(own)
        for engine, given in of_engine.items():
            self.engines[engine].send(VLLMEngine.abort, given, alone=False)
            self._ledger.drop(engine, given)
            for own in given:
                self._finished(own)

    def _drop(self, script: Script, numbers: Collection[int]) -> None:
        """Requests are not wanted any more; engines learn that when the script says."""
        for own in [own for own, number in self._held.items() if number in numbers]:
            del self._held[own]
            script.drop(own)
        for own in [own for own, one in self._unfinished.items() if one.number in numbers]:
            self._finished(own)
            script.drop(own)
        self._follow(script)

    def _collect(self, timeout_s: float) -> dict[int, Completion]:
        """What the engines have finished; waits up to `timeout_s` until one tells anything."""
        busy = [engine for engine in self.engines if self._router.unfinished[engine.number]]
        for engine in busy:
            self._asked |= engine.ask()
        engine_of: dict[str, EngineHandle] = {}
        for engine in self.engines:
            engine_of |= dict.fromkeys(engine.names, engine)
        told = take_ready("generate", self._asked, timeout_s)
        completions = {}
        for name, progress in told.items():
            for own, completion in engine_of[name].told(name, progress).items():
                # One that was aborted may have been finished already.
                if own in self._unfinished:
                    completions[self._finished(own)] = completion
        # With a script first the engine's own deadline, which says what it waits for.
        limit_s = self.timeout_s if self.script is None else 2 * self.timeout_s
        for engine in busy:
            if unfinished := self._router.unfinished[engine.number]:
                engine.check_progress(unfinished, limit_s)
        return completions

    def _finished(self, own: int) -> int:
        """A request has left its engine; the caller's number of it."""
        request = self._unfinished.pop(own)
        self._router.finished(request.engine)
        return request.number

    def start_open_weights(
        self, setup: SyncSetup, meeting: tuple[str, int] | None
    ) -> dict[str, Reply[None]]:
        """Start to open every engine's end of the weight stream."""
        self._await_turn()
        calls: dict[str, Reply[None]] = {}
        for engine in self.engines:
            calls |= self._call(engine, VLLMEngine.open_weights, setup, engine.number, meeting)
        return calls

    def start_update_weights(self, policy_version: int, sync: int) -> dict[str, Reply[SyncReport]]:
        """Start to load a sync into every engine rank; they serve only after `publish`.

        With rollout.update=in_flight each does so between two of its steps, and its requests wait.
        """
        self._await_turn()  # while requests that come before may still be submitted
        self._served = False
        self._settle()
        return self._start_all(VLLMEngine.update_weights, policy_version, sync)

    def score(self, sequences: list[list[int]], temperature: float) -> list[list[list[float]]]:
        """Return, per engine, log-probs of each sequence's tokens after the first.

        They are those of the weights that are loaded, published or not; with unfinished requests
        only of those that are not.
        """
        return self._on_all("sync_weights (canary)", VLLMEngine.score, sequences, temperature)

    def cached_tokens(self) -> list[int]:
        """See `VLLMEngine.cached_tokens`, per engine."""
        return self._on_all("sync_weights (canary)", VLLMEngine.cached_tokens)

    def sleep(self) -> None:
        """Have the engines serve nothing and give their memory back, until the next weights."""
        self._await_turn()
        self._served = False
        self._settle()
        self._on_all("sleep", VLLMEngine.sleep)

    def _settle(self) -> None:
        """Wait for engines that still do again what was answered long ago."""
        if not self._behind:
            return
        calls: dict[str, Reply[None]] = {}
        for engine in self.engines:
            calls |= engine.call(VLLMEngine.abort, [], alone=True)
        gather("finish what was given again", calls, self.timeout_s)
        self._behind = False

    def publish(self, policy_version: int, again: bool = False) -> None:
        """Let the engines serve these weights; their unfinished requests go on under them.

        Engines that were started again are given these. `again`: they get the weights that they had
        before, and all that they had been given since then.
        """
        self._on_all("sync_weights", VLLMEngine.publish, policy_version)
        self._router.forget_prefixes()
        self._served = True
        # Else engines are to do again all that they did with these weights, answered or not: what
        # is unanswered then meets the same others and the same prefixes as before.
        if not again or policy_version != self._published or self._in_flight:
            self._ledger.turn_page(self._unfinished)
        self._published = policy_version
        if self._new:
            self._give_again()
        self._new = False

    def _give_again(self) -> None:
        """Give engines that were started again what they had."""
        for engine in range(len(self.engines)):
            for requests in self._ledger.again(engine, self._unfinished):
                self._give(engine, requests, idle=True)
                self._behind |= not requests.keys() <= self._unfinished.keys()

    def lost(self) -> dict[str, str]:
        """Return the engines of which a process has died, by name, and what Ray says of it.

        None where a node is lost: nothing can be started there again.
        """
        actors: dict[str, Any] = {}
        for engine in self.engines:
            actors |= engine.ranks()
        dead = dead_actors(actors, EngineRank.process_id)
        lost: dict[str, str] = {}
        if not dead or not has_its_nodes(self._reserved):
            return lost
        for engine in self.engines:
            reasons = [dead[name] for name in engine.names if name in dead]
            if reasons:
                lost[f"engine {engine.number}"] = reasons[0]
        return lost

    def restart(self) -> None:
        """Start all engines again, where one was lost; they hold no weights.

        All: what they had begun, they do again in any case, and those that were at a weight sync
        with a lost one may hold half of the weights.
        """
        if self.script is not None:
            raise RuntimeError("an engine died, and what it was at cannot be repeated: begin again")
        self._served = self._behind = False
        for engine in self.engines:
            for _, actor in engine.ranks():
                ray.kill(actor)
        if self._journal is not None:
            self._journal.restarted()
        self._start_processes()
        self.wait_ready()

    def close(self) -> None:
        """Let the engines end their own processes; a failed run's are ended by Ray."""
        calls: dict[str, Reply[None]] = {}
        for engine in self.engines:  # whatever a script has next
            calls |= engine.call(VLLMEngine.close)
        gather("stop vLLM", calls, CLOSE_S)
        if self._journal is not None:
            self._take_the_last()

    def _take_the_last(self) -> None:
        """Have the journal hold what the engines did since they were asked before."""
        for engine in self.engines:
            self._asked |= engine.ask()
        told = dict(zip(self._asked, gather("stop vLLM", self._asked, CLOSE_S), strict=True))
        for engine in self.engines:
            for name in told.keys() & set(engine.names):
                engine.told(name, told[name])
