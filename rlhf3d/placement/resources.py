"""Which Ray bundle each process takes: one a rank of the actor group; other groups' ranks and engine ranks beside them,
or in bundles of their own.

Invariant: the bundles name every process of a run, so Ray refuses at the start what the cluster cannot hold.
Pure: numbers only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf3d.config.groups import WorkerGroup
from rlhf3d.parallel.platform import Platform
from rlhf3d.resharding.plan import ReshardPlan


@dataclass(frozen=True)
class Placement:
    """Bundles of a run, and what its processes take of them."""

    bundles: list[dict[str, float]]
    """Resources of each bundle: the actor group's ranks' first, then those of groups apart, then of engines apart."""
    groups: dict[str, list[int]]
    """By worker group and rank: its bundle. The actor's rank r has bundle r."""
    engine_bundles: list[list[int]] | None
    """By engine and rank: its bundle. None where engine ranks share the bundles of the actor's, by the sync plan."""
    options: dict[str, dict[str, Any]]
    """By worker group, and `engine`: Ray actor options of a rank."""


def place(
    platform: Platform, groups: Sequence[WorkerGroup], engines: int, engine_ranks: int, colocated: bool
) -> Placement:
    """Placement of the worker groups (the actor's first) and `engines` vLLM engines of `engine_ranks` ranks each.

    Raises ValueError for a group that has more ranks than the actor's to share devices with.
    """
    on_gpu = platform.kind != "cpu"
    # On CPU a process takes cores and memory of its own even where it shares the host's memory with others.
    sharing = {group.name for group in groups if on_gpu and (group is groups[0] or group.colocated)}
    sharing |= {"engine"} if on_gpu and colocated else set()
    world, bundle_of, end = groups[0].layout.world_size, {}, 0
    for group in groups:
        ranks = group.layout.world_size
        if group is groups[0] or group.name not in sharing:
            bundle_of[group.name], end = list(range(end, end + ranks)), end + ranks
        elif ranks <= world:
            bundle_of[group.name] = list(range(ranks))
        else:
            raise ValueError(
                f"{group.key} has {ranks} ranks ({group.layout}), more than the {world} of actor.layout, whose devices "
                f"they share; set {group.key.replace('layout', 'placement')}=disaggregated or make the layout smaller"
            )
    apart = [[end + engine * engine_ranks + rank for rank in range(engine_ranks)] for engine in range(engines)]
    count = end + (0 if "engine" in sharing else engines * engine_ranks)
    resources = {"GPU": 1.0} if on_gpu else {}
    shared = [{**resources, "CPU": float(max(len(sharing), 1))}] * world
    gpus = {name: round(1 / len(sharing), 4) if name in sharing else 1.0 for name in (*bundle_of, "engine")}
    return Placement(
        bundles=shared + [{**resources, "CPU": 1.0}] * (count - world),
        groups=bundle_of,
        engine_bundles=None if "engine" in sharing else apart,
        options={name: {"num_cpus": 1.0, **({"num_gpus": gpus[name]} if on_gpu else {})} for name in gpus},
    )


def place_engines(platform: Platform, engines: int, engine_ranks: int) -> Placement:
    """Placement of engines alone."""
    options: dict[str, Any] = {"num_cpus": 1.0} | ({"num_gpus": 1.0} if platform.kind != "cpu" else {})
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if platform.kind != "cpu" else {})
    bundles = [[engine * engine_ranks + rank for rank in range(engine_ranks)] for engine in range(engines)]
    return Placement([bundle] * engines * engine_ranks, {}, bundles, {"engine": options})


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
    wanted = [node for ranks in nodes for node in ranks if node is not None]
    short = sorted({node for node in wanted if wanted.count(node) > len(free[node])})
    if short:
        raise ValueError(
            f"rollout.placement = colocated: Ray has no room for the engine ranks beside the training ranks of node "
            f"{', '.join(map(str, short))}; set rollout.placement = disaggregated, or give each "
            "node more CPUs"
        )
    return [[free[node].pop(0) for node in ranks] for ranks in nodes]
