"""Which Ray bundle each process takes.

Invariant: the bundles name every process of a run, so Ray refuses at the start what the cluster cannot hold, and an
engine that has not to share the training ranks' GPUs is whole on a node. Pure: numbers only.

On GPUs a bundle is a rank of the actor group, beside which other groups' ranks and engine ranks take their shares, or
something apart: a rank, or a whole engine. On CPU it is a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf3d.config.groups import WorkerGroup
from rlhf3d.parallel.platform import Platform
from rlhf3d.resharding.plan import ReshardPlan
from rlhf3d.resharding.sites import home_rank


@dataclass(frozen=True)
class Placement:
    """Bundles of a run, and what its processes take of them."""

    bundles: list[dict[str, float]]
    """Resources of each bundle."""
    strategy: Literal["PACK", "STRICT_SPREAD"]
    """On as few nodes as there is room on, or each on a node of its own."""
    groups: dict[str, list[int]]
    """By worker group and rank: its bundle."""
    engine_bundles: list[list[int]] | None
    """By engine and rank: its bundle. None where engine ranks share the bundles of the actor's, by the sync plan."""
    options: dict[str, dict[str, Any]]
    """By worker group, and `engine`: Ray actor options of a rank."""

    @property
    def cpus(self) -> int:
        """CPUs of all bundles."""
        return int(sum(bundle["CPU"] for bundle in self.bundles))

    @property
    def gpus(self) -> int:
        """GPUs of all bundles."""
        return int(sum(bundle.get("GPU", 0.0) for bundle in self.bundles))


def place(
    platform: Platform,
    groups: Sequence[WorkerGroup],
    engines: int,
    engine_ranks: int,
    colocated: bool,
    nodes: int,
) -> Placement:
    """Placement of the worker groups (the actor's first) and `engines` vLLM engines of `engine_ranks` ranks each, on
    CPU over `nodes` nodes.

    Raises ValueError for a group that has more ranks than the actor's to share devices with.
    """
    if platform.resource == "CPU":
        return _place_on_hosts(groups, engines, engine_ranks, nodes)
    sharing = {group.name for group in groups if group is groups[0] or group.colocated}
    sharing |= {"engine"} if colocated else set()
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
    gpus = {
        name: round(1 / len(sharing), 4) if name in sharing else 1.0
        for name in (*bundle_of, "engine")
    }
    apart = 0 if colocated else engines
    return Placement(
        bundles=[
            *[{"GPU": 1.0, "CPU": float(len(sharing))}] * world,
            *[{"GPU": 1.0, "CPU": 1.0}] * (end - world),
            *[{"GPU": float(engine_ranks), "CPU": float(engine_ranks)}] * apart,
        ],
        strategy="PACK",
        groups=bundle_of,
        engine_bundles=None
        if colocated
        else [[end + engine] * engine_ranks for engine in range(engines)],
        options={name: {"num_cpus": 1.0, "num_gpus": gpus[name]} for name in gpus},
    )


def _place_on_hosts(
    groups: Sequence[WorkerGroup], engines: int, engine_ranks: int, nodes: int
) -> Placement:
    """Each group's ranks in equal shares over the nodes, in order; engines whole on the nodes of their home ranks."""
    used = min(nodes, max(group.layout.world_size for group in groups))
    node_of = {
        group.name: [rank * min(used, ranks) // ranks for rank in range(ranks)]
        for group in groups
        for ranks in [group.layout.world_size]
    }
    actor = node_of[groups[0].name]
    homes = [
        [actor[home_rank(engine, engines, len(actor))]] * engine_ranks for engine in range(engines)
    ]
    processes = [node for of_ranks in (*node_of.values(), *homes) for node in of_ranks]
    return Placement(
        bundles=[{"CPU": float(processes.count(node))} for node in range(used)],
        strategy="STRICT_SPREAD",
        groups=node_of,
        engine_bundles=homes,
        options={name: {"num_cpus": 1.0} for name in (*node_of, "engine")},
    )


def place_engines(platform: Platform, engines: int, engine_ranks: int) -> Placement:
    """Placement of engines alone, each whole on a node."""
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if platform.resource == "GPU" else {})
    options: dict[str, Any] = {f"num_{kind.lower()}s": amount for kind, amount in resources.items()}
    bundle = {kind: amount * engine_ranks for kind, amount in resources.items()}
    return Placement(
        [bundle] * engines,
        "PACK",
        {},
        [[engine] * engine_ranks for engine in range(engines)],
        {"engine": options},
    )


def engine_bundles(placement: Placement, plan: ReshardPlan) -> list[list[int]]:
    """By engine and rank: its bundle, where it shares a training rank's GPU the one that the plan has it on."""
    if placement.engine_bundles is not None:
        return placement.engine_bundles
    places = {(engine, d.index): d.device for d in plan.destinations for engine in d.engines}
    ranks = len(plan.engine_tables)
    devices = [
        [places[engine, rank] for rank in range(ranks)] for engine in range(len(places) // ranks)
    ]
    return [
        [plan.sites.ranks_on(device)[0] for device in engine if device is not None]
        for engine in devices
    ]


def threads_of(nodes: Sequence[int], cores: Sequence[int], asked: int | None) -> list[int]:
    """CPU threads of each process of a group, whose nodes are given: `asked`, or the cores of its node (by `cores`)
    over the group's processes there, at least 1."""
    return [asked or max(1, cores[node] // nodes.count(node)) for node in nodes]


def engine_threads(
    bundles: Sequence[Sequence[int]], nodes: Sequence[int], cores: Sequence[int], asked: int | None
) -> list[list[int]]:
    """`threads_of` the engine ranks in these bundles, by engine and rank; `nodes` are those of the bundles."""
    threads = iter(
        threads_of([nodes[bundle] for ranks in bundles for bundle in ranks], cores, asked)
    )
    return [[next(threads) for _ in ranks] for ranks in bundles]
