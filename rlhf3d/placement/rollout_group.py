"""The vLLM engines as the driver sees them: requests in, completions out, in the same order.

Invariant: all engines serve the same `policy_version`; none serves before it was synced and published.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf3d.config.schema import ClusterConfig
from rlhf3d.observability.logs import setup_logging
from rlhf3d.parallel.meeting import open_meeting
from rlhf3d.placement.cluster import use_node_interface
from rlhf3d.placement.resources import Placement
from rlhf3d.placement.waiting import gather, stream
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import Completion, Request, SamplingSettings
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.vllm_engine import VLLMEngine

CLOSE_S = 60.0


class EngineRank(VLLMEngine):
    """Ray actor of one engine rank: a process first, an engine once it was told where its ranks meet."""

    def __init__(self) -> None:
        """Start the process alone."""

    def rendezvous(self) -> tuple[str, int]:
        """Where this engine's ranks can meet; asked of its rank 0."""
        return ray.util.get_node_ip_address(), open_meeting()

    def start(
        self,
        name: str,
        rank: int,
        meeting: tuple[str, int],
        settings: EngineSettings,
        threads: int,
        output_dir: str | None,
    ) -> None:
        """Start vLLM; what it reports goes to `logs/` of the run's folder, if there is one."""
        use_node_interface()
        if output_dir is not None:
            os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its records then reach ours
            setup_logging(output_dir, name.replace(" ", "_"))
            # It tries a chat template without a tokenizer at its start, and tells of that by a traceback.
            logging.getLogger("vllm.renderers").setLevel(logging.ERROR)
        host = ray.util.get_node_ip_address()
        VLLMEngine.__init__(self, settings, threads=threads, rank=rank, meeting=meeting, host=host)


class RolloutGroup:
    """Handles of the engines; each is a list of the actors of its tensor-parallel ranks, which get the same calls."""

    def __init__(
        self,
        cluster: ClusterConfig,
        placement: Placement,
        reserved: PlacementGroup,
        bundles: Sequence[Sequence[int]],
        threads: Sequence[Sequence[int]],
        settings: EngineSettings,
        environment: Mapping[str, str],
        output_dir: str | None = None,
    ) -> None:
        """Start the engines; `bundles` says where and `threads` with how many CPU threads, by engine and rank;
        `environment` are variables of their processes, `output_dir` the run's folder."""
        self.timeout_s = cluster.phase_timeout_s
        self.startup_timeout_s = cluster.startup_timeout_s
        actor = ray.remote(EngineRank)
        self.engines = [
            [
                actor.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, bundle),
                    runtime_env={"env_vars": {**environment, "OMP_NUM_THREADS": str(own)}},
                    **placement.options["engine"],
                ).remote()
                for bundle, own in zip(of_ranks, of_threads, strict=True)
            ]
            for of_ranks, of_threads in zip(bundles, threads, strict=True)
        ]
        firsts = {
            f"engine {i}": ranks[0].rendezvous.remote() for i, ranks in enumerate(self.engines)
        }
        meetings = gather("start vLLM", firsts, self.startup_timeout_s)
        self._starting = {
            (name := self._name(i, rank)): actor.start.remote(
                name, rank, meeting, settings, threads[i][rank], output_dir
            )
            for i, (ranks, meeting) in enumerate(zip(self.engines, meetings, strict=True))
            for rank, actor in enumerate(ranks)
        }

    def wait_ready(self) -> None:
        """Wait until every engine can take requests."""
        gather("start vLLM", self._starting, self.startup_timeout_s)

    def _name(self, engine: int, rank: int) -> str:
        return (
            f"engine {engine}" if len(self.engines[engine]) == 1 else f"engine {engine} rank {rank}"
        )

    def _start(self, engine: int, method: str, *args: object) -> dict[str, ray.ObjectRef]:
        """Start the same call on every rank of an engine."""
        return {
            self._name(engine, rank): getattr(actor, method).remote(*args)
            for rank, actor in enumerate(self.engines[engine])
        }

    def _start_all(self, method: str, *args: object) -> dict[str, ray.ObjectRef]:
        return {
            name: ref
            for i in range(len(self.engines))
            for name, ref in self._start(i, method, *args).items()
        }

    def _on_all(self, phase: str, method: str, *args: object) -> list:
        """The same call on every engine; what their first ranks return."""
        calls = self._start_all(method, *args)
        results = dict(zip(calls, gather(phase, calls, self.timeout_s), strict=True))
        return [results[self._name(i, 0)] for i in range(len(self.engines))]

    def stream(
        self, phase: str, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Iterator[dict[int, Completion]]:
        """One completion a request, in parts as they finish, by number; requests are dealt to the engines in turn."""
        count = len(self.engines)
        sources = {
            self._name(i, rank): actor.stream.options(num_returns="streaming").remote(
                list(requests[i::count]), sampling
            )
            for i in range(min(count, len(requests)))
            for rank, actor in enumerate(self.engines[i])
        }
        engine_of = {self._name(i, 0): i for i in range(count)}
        answered = 0
        for name, part in stream(phase, sources, self.timeout_s):
            if name in engine_of:  # an engine's other ranks write the same
                answered += len(part)
                yield {
                    engine_of[name] + count * number: completion
                    for number, completion in part.items()
                }
        assert answered == len(requests), f"the engines dropped {len(requests) - answered} requests"

    def start_open_weights(
        self, setup: SyncSetup, meeting: tuple[str, int] | None
    ) -> dict[str, ray.ObjectRef]:
        """Start to open every engine's end of the weight stream."""
        calls: dict[str, ray.ObjectRef] = {}
        for i in range(len(self.engines)):
            calls |= self._start(i, "open_weights", setup, i, meeting)
        return calls

    def start_update_weights(self, policy_version: int, sync: int) -> dict[str, ray.ObjectRef]:
        """Start to load a sync into every engine rank (SyncReport each); they serve only after `publish`."""
        return self._start_all("update_weights", policy_version, sync)

    def score(self, sequences: list[list[int]], temperature: float) -> list[list[list[float]]]:
        """Per engine, log-probs of each sequence's tokens after the first, under the loaded weights."""
        return self._on_all("sync_weights (canary)", "score", sequences, temperature)

    def cached_tokens(self) -> list[int]:
        """Per engine, see `RolloutEngine.cached_tokens`."""
        return self._on_all("sync_weights (canary)", "cached_tokens")

    def sleep(self) -> None:
        """Have the engines serve nothing and give their memory back, until the next weights."""
        self._on_all("sleep", "sleep")

    def publish(self, policy_version: int) -> None:
        """Let the engines serve these weights."""
        self._on_all("sync_weights", "publish", policy_version)

    def close(self) -> None:
        """Let the engines end their own processes; a failed run's are ended by Ray."""
        gather("stop vLLM", self._start_all("close"), CLOSE_S)
