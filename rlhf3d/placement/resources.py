"""Which Ray bundle each process takes.

Invariant: the bundles count every process of a run, so Ray refuses at the start what the cluster
cannot hold; and an engine with dedicated GPUs is on one node.
Pure: numbers only.

On GPUs a bundle is that of a rank of the actor group, where colocated ranks of other groups and of
engines take their shares, or a dedicated one: of a rank, or of an engine. On CPU it is a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rlhf3d.config.groups import WorkerGroup
from rlhf3d.parallel.platform import Platform
from rlhf3d.resharding.plan import ReshardPlan
from rlhf3d.resharding.sites import home_rank


@dataclass(frozen=True)
class Placement:
    """Bundles of a run, and the shares of them that its processes take."""

    bundles: list[dict[str, float]]
    """Resources of each bundle."""
    strategy: Literal["PACK", "STRICT_SPREAD"]
    """On as few nodes as have room, or each on a node of its own."""
    groups: dict[str, list[int]]
    """The bundle of each rank, by worker group."""
    engine_bundles: list[list[int]] | None
    """The bundle of each rank, by engine. None where engine ranks share those of the actor's ranks:
    the plan of the weight sync says which."""
    options: dict[str, dict[str, Any]]
    """Ray actor options of a rank, by worker group and for `engine`."""

    @property
    def cpus(self) -> int:
        """CPUs of all bundles."""
        return int(sum(bundle["CPU"] for bundle in self.bundles))

    @property
    def gpus(self) -> int:
        """GPUs of all bundles."""
        return int(sum(bundle.get("GPU", 0.0) for bundle in self.bundles))


def starts_with(environment: dict[str, str]) -> dict[str, Any]:
    """Ray actor options of a process that starts with variables of its own, if there are any.

    Ray starts it twice then: an agent's process makes the environment first. Without them it is one
    of those that Ray has started already.
    """
    return {"runtime_env": {"env_vars": environment}} if environment else {}


def place(
    platform: Platform,
    groups: Sequence[WorkerGroup],
    engines: int,
    engine_ranks: int,
    colocated: bool,
    nodes: int,
) -> Placement:
    """Return the placement of the worker groups (the actor's first) and of the engines.

    On CPU they spread over `nodes` nodes. Raises ValueError for a colocated group with more ranks
    than the actor's.
    """
    if platform.resource == "CPU":
        return _place_on_hosts(groups, engines, engine_ranks, nodes)
    actor, *others = groups
    # Who shares the actor's devices: each takes an equal share of a GPU.
    sharing = [actor.name, *(group.name for group in others if group.colocated)]
    if colocated:
        sharing.append("engine")
    world = actor.layout.world_size
    # Bundle r is that of the actor's rank r; dedicated ones follow.
    bundle_of = {actor.name: list(range(world))}
    end = world
    for group in others:
        ranks = group.layout.world_size
        if group.name not in sharing:
            bundle_of[group.name] = list(range(end, end + ranks))
            end += ranks
            continue
        if ranks > world:
            placement_key = group.key.replace("layout", "placement")
            raise ValueError(
                f"{group.key} has {ranks} ranks ({group.layout}), more than the {world} "
                f"of actor.layout, whose devices they share; set {placement_key}=disaggregated or "
                "make the layout smaller"
            )
        # Rank r shares the GPU of the actor's rank r.
        bundle_of[group.name] = list(range(ranks))
    # One CPU for each process that shares the GPU.
    shared = {"GPU": 1.0, "CPU": float(len(sharing))}
    dedicated = {"GPU": 1.0, "CPU": 1.0}
    bundles = [shared] * world + [dedicated] * (end - world)
    of_engines: list[list[int]] | None = None
    if not colocated:
        # One bundle for all ranks of an engine: Ray keeps a bundle on one node.
        bundles += [{"GPU": float(engine_ranks), "CPU": float(engine_ranks)}] * engines
        of_engines = [[end + engine] * engine_ranks for engine in range(engines)]
    options: dict[str, dict[str, Any]] = {}
    for name in (*bundle_of, "engine"):
        # Ray counts in ten-thousandths; of four at most, the sum stays within 1.
        share = round(1 / len(sharing), 4) if name in sharing else 1.0
        options[name] = {"num_cpus": 1.0, "num_gpus": share}
    return Placement(bundles, "PACK", bundle_of, of_engines, options)


def _place_on_hosts(
    groups: Sequence[WorkerGroup], engines: int, engine_ranks: int, nodes: int
) -> Placement:
    """Each group's ranks in equal shares over the nodes, in order.

    An engine is on one node, that of its home rank.
    """
    # Every node that is used gets a rank of the largest group.
    used = min(nodes, max(group.layout.world_size for group in groups))
    node_of: dict[str, list[int]] = {}
    for group in groups:
        ranks = group.layout.world_size
        # Consecutive ranks on a node: `min` gives a small group one rank on each of fewer nodes.
        node_of[group.name] = [rank * min(used, ranks) // ranks for rank in range(ranks)]
    actor = node_of[groups[0].name]
    homes = []
    for engine in range(engines):
        home = actor[home_rank(engine, engines, len(actor))]
        homes.append([home] * engine_ranks)
    processes: list[int] = []
    for nodes_of_ranks in (*node_of.values(), *homes):
        processes += nodes_of_ranks
    return Placement(
        bundles=[{"CPU": float(processes.count(node))} for node in range(used)],
        strategy="STRICT_SPREAD",
        groups=node_of,
        engine_bundles=homes,
        options={name: {"num_cpus": 1.0} for name in (*node_of, "engine")},
    )


def place_engines(platform: Platform, engines: int, engine_ranks: int) -> Placement:
    """Return the placement of engines alone, each on one node."""
    options: dict[str, Any] = {"num_cpus": 1.0}
    bundle = {"CPU": float(engine_ranks)}
    if platform.resource == "GPU":
        options["num_gpus"] = 1.0
        bundle["GPU"] = float(engine_ranks)
    return Placement(
        bundles=[bundle] * engines,
        strategy="PACK",
        groups={},
        engine_bundles=[[engine] * engine_ranks for engine in range(engines)],
        options={"engine": options},
    )


def engine_bundles(placement: Placement, plan: ReshardPlan) -> list[list[int]]:
    """Return the bundle of each engine rank, by engine and rank.

    Where engines share the training ranks' GPUs, it is that of the GPU on which the plan has it.
    """
    if placement.engine_bundles is not None:
        return placement.engine_bundles
    device_of: dict[tuple[int, int], int] = {}
    for destination in plan.destinations:
        assert destination.device is not None, "engines share devices"
        for engine in destination.engines:
            device_of[engine, destination.index] = destination.device
    ranks = len(plan.engine_tables)
    bundles = []
    for engine in range(len(device_of) // ranks):
        devices = [device_of[engine, rank] for rank in range(ranks)]
        # A GPU has one rank of the actor, and that rank has the bundle of its own number.
        bundles.append([plan.sites.ranks_on(device)[0] for device in devices])
    return bundles


def threads_of(nodes: Sequence[int], cores: Sequence[int], asked: int | None) -> list[int]:
    """Return the CPU threads of each process of a group, whose `nodes` are given.

    They are `asked`, or the cores of its node (by `cores`) over the group's processes there, at
    least 1.
    """
    return [asked or max(1, cores[node] // nodes.count(node)) for node in nodes]


def engine_threads(
    bundles: Sequence[Sequence[int]], nodes: Sequence[int], cores: Sequence[int], asked: int | None
) -> list[list[int]]:
    """Return `threads_of` the engine ranks in these bundles, by engine and rank.

    `nodes` are those of the bundles.
    """
    node_of_rank: list[int] = []
    for ranks in bundles:
        node_of_rank += [nodes[bundle] for bundle in ranks]
    threads = iter(threads_of(node_of_rank, cores, asked))
    return [list(islice(threads, len(ranks))) for ranks in bundles]
