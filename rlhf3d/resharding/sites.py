"""Where training ranks and engine ranks are, and which engine rank goes on which device.

Invariant: the assignment keeps each engine's ranks on one node (or on complete neighboring nodes
where an engine is larger than a node), fills no device beyond its slots, and leaves the fewest
bytes to move. On CPU, where a node is one device, an engine is on the node of its home rank. Pure:
numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sites:
    """The devices that hold training ranks, and their nodes.

    A device is what shares memory with a rank at no cost: a GPU, or on CPU the whole host.
    """

    device_of_rank: tuple[int, ...]
    """Device of each training rank."""
    node_of_device: tuple[int, ...]
    """Node of each device."""
    slots: int | None = 1
    """Engine ranks a device can take.

    None where devices are hosts, which take those of their ranks' engines.
    """

    @classmethod
    def gpus(cls, world_size: int, per_node: int) -> Sites:
        """One training rank a GPU, `per_node` GPUs a node."""
        return cls.one_each([rank // per_node for rank in range(world_size)])

    @classmethod
    def one_each(cls, node_of_rank: Sequence[int]) -> Sites:
        """A device for each training rank."""
        return cls(tuple(range(len(node_of_rank))), tuple(node_of_rank))

    @classmethod
    def hosts(cls, host_of_rank: Sequence[int]) -> Sites:
        """CPU ranks: each host is one device."""
        # Each host is a device and a node at once, with one number for both.
        return cls(tuple(host_of_rank), tuple(range(max(host_of_rank) + 1)), slots=None)

    def ranks_on(self, device: int) -> list[int]:
        """Training ranks of a device."""
        return [rank for rank, own in enumerate(self.device_of_rank) if own == device]

    def node_of_rank(self, rank: int) -> int:
        """Node of a training rank."""
        return self.node_of_device[self.device_of_rank[rank]]


def home_rank(engine: int, engines: int, world_size: int) -> int:
    """On CPU: the training rank on whose node all of an engine is.

    Engines are spread over the ranks.
    """
    return engine * world_size // engines


def assign_engines(
    sites: Sites, engines: int, engine_tp: int, overlap: Callable[[int, int], int]
) -> list[tuple[int, ...]]:
    """For each engine, the device of each of its tensor-parallel ranks.

    `overlap(device, index)` is what a device already holds of what tensor-parallel rank `index`
    needs, bytes; the sum over all engine ranks is maximized (a minimum-cost flow on each group of
    nodes). Raises ValueError when the devices have not room for the engines.
    """
    if sites.slots is None:
        homes = (home_rank(engine, engines, len(sites.device_of_rank)) for engine in range(engines))
        # A host holds all of an engine's ranks: on CPU it has no slots to run out of.
        return [(sites.device_of_rank[home],) * engine_tp for home in homes]
    groups = _node_groups(sites, engine_tp)
    # How many engines each group takes comes first, so that groups can be solved one by one.
    counts = _spread(sites, groups, engines, engine_tp)
    # (engines of a group, overlap [device][index]) -> positions of its devices.
    solved: dict[tuple[int, tuple[tuple[int, ...], ...]], list[int]] = {}
    placed: list[tuple[int, ...]] = []
    for devices, count in zip(groups, counts, strict=True):
        if count:
            weights = tuple(_row_of(overlap, device, engine_tp) for device in devices)
            # Equal nodes have equal problems.
            if (count, weights) not in solved:
                solved[count, weights] = _solve(weights, count, sites.slots)
            taken = [devices[position] for position in solved[count, weights]]
            # `taken` lists the devices of index 0, then those of index 1, …: an engine takes one of
            # each.
            placed += [tuple(taken[engine::count]) for engine in range(count)]
    return placed


def _row_of(overlap: Callable[[int, int], int], device: int, engine_tp: int) -> tuple[int, ...]:
    """What a device holds of what each tensor-parallel rank needs."""
    return tuple(overlap(device, index) for index in range(engine_tp))


def _node_groups(sites: Sites, engine_tp: int) -> list[list[int]]:
    """Devices by node; of several neighboring nodes where one has not room for an engine."""
    nodes: dict[int, list[int]] = {}
    for device, node in enumerate(sites.node_of_device):
        nodes.setdefault(node, []).append(device)
    groups: list[list[int]] = [[]]
    for node in sorted(nodes):
        # One engine fits: the group is complete. Smaller nodes are joined until then.
        if _room(sites, groups[-1], engine_tp):
            groups.append([])
        groups[-1] += nodes[node]
    return groups


def _room(sites: Sites, devices: Sequence[int], engine_tp: int) -> int:
    """How many engines fit on these devices."""
    return (sites.slots or 0) * len(devices) // engine_tp


def _spread(
    sites: Sites, groups: Sequence[Sequence[int]], engines: int, engine_tp: int
) -> list[int]:
    """Engines of each group, as equal as their room allows.

    Raises ValueError where there are too many.
    """
    rooms = [_room(sites, devices, engine_tp) for devices in groups]
    counts = [0] * len(groups)
    if engines > sum(rooms):
        raise ValueError(
            f"rollout.engines = {engines} x rollout.tensor_parallel_size = {engine_tp}: the "
            f"{len(sites.node_of_device)} devices that train have room for {sum(rooms)} engines; "
            "lower one of them, or set rollout.placement = disaggregated"
        )
    for _ in range(engines):
        with_room = [number for number, room in enumerate(rooms) if counts[number] < room]
        counts[min(with_room, key=counts.__getitem__)] += 1
    return counts


def _solve(weights: tuple[tuple[int, ...], ...], count: int, slots: int) -> list[int]:
    """Positions of devices for `count` ranks of index 0, then of index 1, and so on.

    Their sum of weights is the greatest: the flow of least cost from `source` over devices, which
    take `slots` ranks each, to the indices.
    """
    # Not at the top: every process imports this file, and only some drivers have to choose.
    import networkx

    indices = range(len(weights[0]))
    graph = networkx.DiGraph()
    # In networkx a negative demand is a supply: every rank of every engine leaves here.
    graph.add_node("source", demand=-count * len(indices))
    for index in indices:
        graph.add_node(("index", index), demand=count)
    for position, row in enumerate(weights):
        # All weights are whole numbers, for which the flow found is exactly the best.
        graph.add_edge("source", position, capacity=slots, weight=0)
        for index in indices:
            # Negative, as the flow of least cost is to keep the most bytes in place.
            graph.add_edge(position, ("index", index), weight=-row[index])
    flow = networkx.min_cost_flow(graph)
    positions: list[int] = []
    for index in indices:
        for position in range(len(weights)):
            # The flow over an edge may exceed 1 where a device has several slots.
            positions += [position] * flow[position].get(("index", index), 0)
    return positions
