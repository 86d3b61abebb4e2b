"""Engine ranks are put on devices that have room for them, engines whole on a node, with the
greatest overlap.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.resharding.sites import Sites, assign_engines


def nothing(device: int, index: int) -> int:
    """No overlap anywhere."""
    return 0


def test_gpus_and_hosts() -> None:
    gpus = Sites.gpus(6, per_node=4)
    assert gpus.device_of_rank == (0, 1, 2, 3, 4, 5) and gpus.node_of_device == (0, 0, 0, 0, 1, 1)
    assert [gpus.node_of_rank(rank) for rank in (3, 4)] == [0, 1] and gpus.ranks_on(4) == [4]
    hosts = Sites.hosts([1, 0, 1])
    assert hosts.node_of_device == (0, 1) and hosts.slots is None
    assert hosts.ranks_on(1) == [0, 2] and hosts.node_of_rank(1) == 0


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_the_sum_of_overlaps_is_the_greatest(data: st.DataObject) -> None:
    """On one node, against every way to put the ranks on devices, for any overlaps and slots."""
    devices, tp, slots = (data.draw(st.integers(1, n)) for n in (5, 3, 2))
    sites = Sites(tuple(range(devices)), (0,) * devices, slots)
    engines = data.draw(st.integers(1, max(1, slots * devices // tp)))
    overlaps = data.draw(st.lists(st.integers(0, 5), min_size=devices * tp, max_size=devices * tp))
    if engines * tp > slots * devices:
        return

    def overlap(device: int, index: int) -> int:
        return overlaps[device * tp + index]

    placed = assign_engines(sites, engines, tp, overlap)
    assert len(placed) == engines and all(len(engine) == tp for engine in placed)
    assert max(Counter(itertools.chain(*placed)).values()) <= slots
    best = {(0,) * devices: 0}  # ranks on each device -> the greatest sum
    for index in list(range(tp)) * engines:
        longer: dict[tuple[int, ...], int] = {}
        for load, total in best.items():
            for device in range(devices):
                more = (*load[:device], load[device] + 1, *load[device + 1 :])
                if more[device] <= slots:
                    longer[more] = max(longer.get(more, 0), total + overlap(device, index))
        best = longer
    found = sum(overlap(device, index) for engine in placed for index, device in enumerate(engine))
    assert found == max(best.values())


@pytest.mark.parametrize(
    ("world", "per_node", "tp", "engines"),
    [
        (16, 8, 4, 4),
        (16, 8, 8, 2),
        (12, 4, 3, 3),
        (10, 8, 2, 5),
        (10, 4, 4, 2),
        (6, 4, 2, 3),
        (8, 8, 3, 2),
        (20, 8, 4, 5),
    ],
)
def test_engines_are_whole_on_a_node(world: int, per_node: int, tp: int, engines: int) -> None:
    """Uneven last nodes take what they have room for."""
    sites = Sites.gpus(world, per_node)
    placed = assign_engines(sites, engines, tp, lambda device, index: (device * 7 + index * 5) % 11)
    assert len(placed) == engines
    assert all(len({sites.node_of_device[device] for device in engine}) == 1 for engine in placed)
    assert max(Counter(itertools.chain(*placed)).values()) == 1


def test_an_engine_larger_than_a_node_gets_neighboring_nodes() -> None:
    sites = Sites.gpus(16, per_node=4)
    placed = assign_engines(sites, 2, 8, nothing)
    assert [{sites.node_of_device[device] for device in engine} for engine in placed] == [
        {0, 1},
        {2, 3},
    ]
    (six,) = assign_engines(sites, 1, 6, nothing)
    assert len(set(six)) == 6 and {sites.node_of_device[device] for device in six} == {0, 1}


def test_engines_are_spread_over_nodes() -> None:
    sites = Sites.gpus(24, per_node=8)
    nodes = [sites.node_of_device[engine[0]] for engine in assign_engines(sites, 4, 2, nothing)]
    assert Counter(nodes) == {0: 2, 1: 1, 2: 1}
    hosts = Sites.hosts([0, 0, 1])
    assert assign_engines(hosts, 3, 2, nothing) == [(0, 0), (0, 0), (1, 1)]


def test_an_engine_fits_beside_what_its_ranks_hold() -> None:
    """Device d holds all of index 3 - d: the engine runs backwards over the node."""
    placed = assign_engines(Sites.gpus(4, 4), 1, 4, lambda device, index: int(index == 3 - device))
    assert placed == [(3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("world", "per_node", "tp", "engines", "room"),
    [(8, 8, 4, 3, 2), (8, 4, 3, 3, 2), (4, 4, 8, 1, 0), (10, 8, 4, 3, 2)],
)
def test_too_many_engines_are_refused_with_the_arithmetic(
    world: int, per_node: int, tp: int, engines: int, room: int
) -> None:
    message = (
        rf"engines = {engines} x rollout\.tensor_parallel_size = {tp}: .* {world} devices "
        rf".* room for {room} eng"
    )
    with pytest.raises(ValueError, match=message):
        assign_engines(Sites.gpus(world, per_node), engines, tp, nothing)
