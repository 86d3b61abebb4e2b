"""The vLLM engines of an evaluation, which serve a model folder's own weights.

Invariant: vLLM is imported when the engine is made, and so not for an evaluation that has nothing
left to generate. One engine of one rank lives in this process; more are processes that Ray places,
and are gone after `close`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf3d.config.resolve import resolve_rollout
from rlhf3d.config.schema import ClusterConfig, RolloutConfig
from rlhf3d.evaluation.run import Engine
from rlhf3d.rollout.api import Completion, Request, Stops

if TYPE_CHECKING:
    from rlhf3d.rollout.settings import EngineSettings


def engine_maker(
    model: Path, max_model_len: int, seed: int, rollout: RolloutConfig, ray_address: str | None
) -> Callable[[Stops], Engine]:
    """Return a function that starts the engines that `rollout` describes.

    They run in processes on the Ray cluster at `ray_address`, or on one that is started here; one
    engine of one rank without an address runs in this process.
    """

    def make(stops: Stops) -> Engine:
        from rlhf3d.parallel.platform import choose_platform
        from rlhf3d.rollout.settings import EngineSettings

        platform = choose_platform("auto")
        settings = EngineSettings(
            str(model.resolve()),
            resolve_rollout(rollout, platform),
            max_model_len,
            platform,
            seed,
            stops,
            tokenizer=str(model.resolve()),
            load_weights=True,
        )
        if rollout.engines == rollout.tensor_parallel_size == 1 and ray_address is None:
            from rlhf3d.machine import cores
            from rlhf3d.rollout.vllm_engine import VLLMEngine

            # The engine will live in this process, and its libraries read these once.
            os.environ.update(platform.environment("engine", settings.rollout.dtype))
            return VLLMEngine(settings, threads=rollout.threads or cores()).start()
        return PlacedEngines(settings, ClusterConfig(ray_address=ray_address))

    return make


class PlacedEngines:
    """Engines in processes that Ray places."""

    def __init__(self, settings: EngineSettings, cluster: ClusterConfig) -> None:
        from rlhf3d.placement.cluster import cores_of, nodes_of, ray_cluster, reserve
        from rlhf3d.placement.resources import engine_threads, place_engines
        from rlhf3d.placement.rollout_group import RolloutGroup

        platform, rollout = settings.platform, settings.rollout
        placement = place_engines(platform, rollout.engines, rollout.tensor_parallel_size)
        bundles = placement.engine_bundles
        assert bundles is not None
        self._placed = ExitStack()
        with ExitStack() as stack:  # ends what was started, should the start fail half way
            stack.enter_context(ray_cluster(cluster, placement.cpus))
            reserved = stack.enter_context(reserve(placement, cluster.startup_timeout_s))
            cores = cores_of(reserved, cluster.startup_timeout_s)
            threads = engine_threads(bundles, nodes_of(reserved), cores, rollout.threads)
            self._group = RolloutGroup(settings, cluster, placement, reserved, bundles, threads)
            self._group.wait_ready()
            stack.callback(self._group.close)
            # Everything started: from here on `close` ends it.
            self._placed = stack.pop_all()

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`."""
        self._group.submit(requests)

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """See `Engines.poll`."""
        return self._group.poll(timeout_s)

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""
        self._group.abort(numbers)

    def close(self) -> None:
        """End the processes."""
        self._placed.close()
