"""Which Ray bundle each process takes: one a training rank; engine ranks beside them, or in bundles of their own.

Invariant: the bundles name every process of a run, so Ray refuses at the start what the cluster cannot hold.
Pure: numbers only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf3d.parallel.platform import Platform
from rlhf3d.resharding.plan import ReshardPlan


@dataclass(frozen=True)
class Placement:
    """Bundles of a run, and what its processes take of them."""

    bundles: list[dict[str, float]]
    """Resources of each bundle; bundle r is training rank r's, those of engine ranks apart come after."""
    engine_bundles: list[list[int]] | None
    """By engine and rank: its bundle. None where engine ranks share the bundles of training ranks, by the sync plan."""
    train_options: dict[str, Any]
    """Ray actor options of a training rank."""
    engine_options: dict[str, Any]
    """Ray actor options of an engine rank."""


def place(platform: Platform, world_size: int, engines: int, engine_ranks: int, colocated: bool) -> Placement:
    """Placement of `world_size` training ranks and `engines` vLLM engines of `engine_ranks` ranks each."""
    count = engines * engine_ranks
    apart = [[world_size + engine * engine_ranks + rank for rank in range(engine_ranks)] for engine in range(engines)]
    if platform.kind == "cpu":
        # A process takes cores and memory of its own even where it shares the host's memory with training ranks.
        return Placement([{"CPU": 1.0}] * (world_size + count), apart, {"num_cpus": 1}, {"num_cpus": 1})
    if not colocated:
        options = {"num_cpus": 1.0, "num_gpus": 1.0}
        return Placement([{"GPU": 1.0, "CPU": 1.0}] * (world_size + count), apart, options, options)
    options = {"num_cpus": 1.0, "num_gpus": 0.5}
    return Placement([{"GPU": 1.0, "CPU": 2.0}] * world_size, None, options, options)


def engine_bundles(placement: Placement, plan: ReshardPlan, node_of_bundle: Sequence[int]) -> list[list[int]]:
    """By engine and rank: the bundle that puts it on the device where the plan has it.

    Raises ValueError when the bundles that Ray gave engine ranks are not on those nodes.
    """
    places = {(engine, d.index): d.device for d in plan.destinations for engine in d.engines}
    engines = [
        [places[engine, rank] for rank in range(len(plan.engine_tables))]
        for engine in range(len(places) // len(plan.engine_tables))
    ]
    if placement.engine_bundles is None:
        return [[plan.sites.ranks_on(device)[0] for device in ranks if device is not None] for ranks in engines]
    free: dict[int | None, list[int]] = defaultdict(list)
    for bundle in (bundle for ranks in placement.engine_bundles for bundle in ranks):
        free[node_of_bundle[bundle]].append(bundle)
    if not any(device is not None for ranks in engines for device in ranks):
        return placement.engine_bundles
    nodes = [[None if device is None else plan.sites.node_of_device[device] for device in ranks] for ranks in engines]
    short = {node for ranks in nodes for node in ranks if sum(r.count(node) for r in nodes) > len(free[node])}
    if short:
        raise ValueError(
            f"rollout.placement = colocated: Ray has no room for the engine ranks beside the training ranks of node "
            f"{', '.join(map(str, sorted(filter(None, short))))}; set rollout.placement = disaggregated, or give each "
            "node more CPUs"
        )
    return [[free[node].pop(0) for node in ranks] for ranks in nodes]
