"""Which Ray bundle each process takes: one a training rank; engines beside them on CPU, on the same GPUs on CUDA.

Invariant: the bundles name every process of a run, so Ray refuses at the start what the cluster cannot hold.
Pure: numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf3d.parallel.platform import Platform


@dataclass(frozen=True)
class Placement:
    """Bundles of a run, and where its processes go."""

    bundles: list[dict[str, float]]
    """Resources of each bundle; bundle r is training rank r's."""
    engine_bundles: list[int]
    """Bundle of each engine."""
    train_options: dict[str, Any]
    """Ray actor options of a training rank."""
    engine_options: dict[str, Any]
    """Ray actor options of an engine."""


def place(platform: Platform, world_size: int, engines: int, engine_ranks: int) -> Placement:
    """Colocated placement of `world_size` training ranks and `engines` vLLM engines of `engine_ranks` ranks each.

    Raises ValueError for what the platform cannot place.
    """
    if platform.kind == "cpu":
        return Placement(
            bundles=[{"CPU": 1.0}] * world_size + [{"CPU": float(engine_ranks)}] * engines,
            engine_bundles=list(range(world_size, world_size + engines)),
            train_options={"num_cpus": 1},
            engine_options={"num_cpus": engine_ranks},
        )
    if engine_ranks > 1:
        raise ValueError(
            f"rollout.tensor_parallel_size={engine_ranks}: engines that share GPUs with the trainers have one rank; "
            "set it to 1 and rollout.engines to the number of GPUs"
        )
    if engines > world_size:
        raise ValueError(f"rollout.engines={engines}: at most one a GPU of actor.layout, which has {world_size}")
    return Placement(
        bundles=[{"GPU": 1.0, "CPU": 2.0}] * world_size,
        engine_bundles=list(range(engines)),
        train_options={"num_cpus": 1, "num_gpus": 0.5},
        engine_options={"num_cpus": 1, "num_gpus": 0.5},
    )
