"""The vLLM engines of an evaluation, which serve a model folder's own weights.

Invariant: vLLM is imported when the engine is made, and so not for an evaluation that has nothing left to generate. One
engine of one rank lives in this process; more are processes that Ray places, and are gone after `close`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf3d.config.schema import ClusterConfig
from rlhf3d.evaluation.run import Engine
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, Stops

if TYPE_CHECKING:
    from rlhf3d.parallel.platform import Platform


@dataclass(frozen=True)
class EngineOptions:
    """How to run it here; no results depend on it beyond rounding."""

    dtype: str = "auto"
    max_num_seqs: int = 64
    threads: int | None = None
    """CPU threads a rank; null for a node's cores over the ranks there."""
    kv_cache_gib: float = 1.0
    """A rank, on CPU."""
    gpu_memory_utilization: float = 0.9
    """On a GPU."""
    engines: int = 1
    """Engines that share the prompts."""
    tensor_parallel_size: int = 1
    """Ranks an engine."""
    ray_address: str | None = None
    """A running Ray cluster to place them on; null starts one here."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"--dtype {self.dtype}: must be auto, bfloat16 or float32")
        if self.engines < 1 or self.tensor_parallel_size < 1:
            raise ValueError(
                f"--engines {self.engines}, --tensor-parallel-size {self.tensor_parallel_size}: at least 1"
            )


def engine_maker(
    model: Path, max_model_len: int, seed: int, options: EngineOptions
) -> Callable[[Stops], Engine]:
    """A function that starts what generates."""

    def make(stops: Stops) -> Engine:
        from rlhf3d.parallel.platform import choose_platform

        platform = choose_platform("auto")
        arguments: dict[str, Any] = {
            "model_path": str(model.resolve()),
            "dtype": platform.fast_dtype if options.dtype == "auto" else options.dtype,
            "tensor_parallel_size": options.tensor_parallel_size,
            "max_model_len": max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "kv_cache_gib": options.kv_cache_gib,
            "seed": seed,
            "enforce_eager": platform.eager_engines,
            "platform_kind": platform.kind,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "load_weights": True,
            "stops": stops,
        }
        if options.engines == options.tensor_parallel_size == 1 and options.ray_address is None:
            from rlhf3d.machine import cores
            from rlhf3d.rollout.vllm_engine import VLLMEngine

            os.environ.update(platform.environment("engine", arguments["dtype"]))
            return VLLMEngine(**arguments, threads=options.threads or cores())
        return PlacedEngines(platform, options, arguments)

    return make


class PlacedEngines:
    """Engines in processes of their own."""

    def __init__(
        self, platform: Platform, options: EngineOptions, arguments: dict[str, Any]
    ) -> None:
        from rlhf3d.placement.cluster import cores_of, nodes_of, ray_cluster, reserve
        from rlhf3d.placement.resources import engine_threads, place_engines
        from rlhf3d.placement.rollout_group import RolloutGroup

        cluster = ClusterConfig(ray_address=options.ray_address)
        placement = place_engines(platform, options.engines, options.tensor_parallel_size)
        bundles = placement.engine_bundles
        assert bundles is not None
        self._placed = ExitStack()
        with ExitStack() as stack:
            stack.enter_context(ray_cluster(cluster, placement.cpus))
            reserved = stack.enter_context(reserve(placement, cluster.startup_timeout_s))
            cores = cores_of(reserved, cluster.startup_timeout_s)
            threads = engine_threads(bundles, nodes_of(reserved), cores, options.threads)
            own = platform.environment("engine", arguments["dtype"])
            self._group = RolloutGroup(
                cluster, placement, reserved, bundles, threads, arguments, own
            )
            self._group.wait_ready()
            stack.callback(self._group.close)
            self._placed = stack.pop_all()

    def stream(
        self, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Iterator[dict[int, Completion]]:
        """See `RolloutEngine.stream`."""
        return self._group.stream("generate", requests, sampling)

    def close(self) -> None:
        """End the processes."""
        self._placed.close()
