"""Bundles of a run, and which of them engine ranks take."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf3d.config.groups import WorkerGroup, device_terms, worker_groups
from rlhf3d.config.schema import ActorConfig, Config, CriticConfig, LayoutConfig, RolloutConfig
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.placement.resources import (
    engine_bundles,
    engine_threads,
    place,
    place_engines,
    threads_of,
)
from rlhf3d.resharding.sites import Sites, assign_engines
from rlhf3d.resharding.tables import plan_sync

CPU, CUDA = CPUPlatform(reason="test"), CUDAPlatform(reason="test")
SPEC = ModelSpec(
    "llama",
    num_layers=4,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    ffn_size=64,
    vocab_size=128,
)
LAYOUT = ParallelLayout(tp=2, pp=2, dp=2)


def groups(tp: int, critic: int = 0, colocated: bool = True) -> list[WorkerGroup]:
    """An actor group of `tp` ranks, and a critic group of `critic` where there is one."""
    actor = WorkerGroup("actor", "actor.layout", ("actor",), "model", LayoutConfig(tp=tp))
    own = WorkerGroup(
        "critic", "critic.layout", ("critic",), "model", LayoutConfig(dp=critic), colocated
    )
    return [actor, own] if critic else [actor]


def test_on_cpu_a_bundle_is_a_node() -> None:
    """Equal shares of every group, and engines whole beside their home ranks."""
    here = place(CPU, groups(tp=4, critic=2), engines=2, engine_ranks=2, colocated=True, nodes=1)
    assert (here.bundles, here.engine_bundles) == ([{"CPU": 10.0}], [[0, 0], [0, 0]])
    placement = place(
        CPU, groups(tp=4, critic=2), engines=2, engine_ranks=2, colocated=True, nodes=2
    )
    assert placement.groups == {"actor": [0, 0, 1, 1], "critic": [0, 1]}
    assert placement.engine_bundles == [[0, 0], [1, 1]]
    assert (placement.bundles, placement.strategy, placement.cpus) == (
        [{"CPU": 5.0}] * 2,
        "STRICT_SPREAD",
        10,
    )
    uneven = place(CPU, groups(tp=3), engines=1, engine_ranks=2, colocated=False, nodes=2)
    assert (uneven.groups["actor"], uneven.engine_bundles) == ([0, 0, 1], [[0, 0]])
    assert uneven.bundles == [{"CPU": 4.0}, {"CPU": 1.0}]
    small = place(CPU, groups(tp=1, critic=2), engines=3, engine_ranks=1, colocated=True, nodes=4)
    assert (small.groups, small.engine_bundles) == ({"actor": [0], "critic": [0, 1]}, [[0]] * 3)
    assert small.bundles == [{"CPU": 5.0}, {"CPU": 1.0}]


@given(
    world=st.integers(1, 12),
    engines=st.integers(1, 6),
    ranks=st.integers(1, 4),
    nodes=st.integers(1, 5),
)
def test_on_cpu_colocated_engines_are_where_the_sync_plan_has_them(
    world: int, engines: int, ranks: int, nodes: int
) -> None:
    placement = place(CPU, groups(tp=world), engines, ranks, True, nodes)
    sites, bundles = Sites.hosts(placement.groups["actor"]), placement.engine_bundles
    assert bundles is not None
    assert [
        list(devices) for devices in assign_engines(sites, engines, ranks, lambda device, index: 0)
    ] == bundles
    assert all(len(set(of_ranks)) == 1 for of_ranks in bundles)
    taken = Counter([*placement.groups["actor"], *itertools.chain(*bundles)])
    assert placement.bundles == [{"CPU": float(taken[node])} for node in range(min(nodes, world))]


def test_threads_are_the_cores_of_the_node_over_the_processes_there() -> None:
    assert threads_of([0, 0, 0, 1], [8, 2], None) == [2, 2, 2, 2]
    assert threads_of([0, 0, 1], [8, 64], None) == [4, 4, 64]
    assert threads_of([0, 0, 0], [2], None) == [1, 1, 1]
    assert threads_of([0, 1], [8, 64], 3) == [3, 3]
    assert engine_threads([[0, 0], [2, 2]], [0, 1, 1], [8, 64], None) == [[4, 4], [32, 32]]


def test_cuda_engines_share_the_trainers_gpus() -> None:
    placement = place(CUDA, groups(tp=8), engines=4, engine_ranks=2, colocated=True, nodes=1)
    assert placement.bundles == [{"GPU": 1.0, "CPU": 2.0}] * 8
    assert placement.options["actor"]["num_gpus"] + placement.options["engine"]["num_gpus"] == 1
    plan = plan_sync(SPEC, LAYOUT, Sites.gpus(8, 8), 4, 2)
    bundles = engine_bundles(placement, plan)
    assert sorted(bundle for ranks in bundles for bundle in ranks) == list(range(8))
    # Each engine rank is where the tensor-parallel half it needs is.
    assert all(
        LAYOUT.coords(bundle).tp == rank for ranks in bundles for rank, bundle in enumerate(ranks)
    )


def test_cuda_engines_apart_have_gpus_of_their_own() -> None:
    placement = place(CUDA, groups(tp=8), engines=2, engine_ranks=2, colocated=False, nodes=2)
    assert placement.bundles == [{"GPU": 1.0, "CPU": 1.0}] * 8 + [{"GPU": 2.0, "CPU": 2.0}] * 2
    plan = plan_sync(SPEC, LAYOUT, Sites.gpus(8, 8), 2, 2, colocated=False)
    assert engine_bundles(placement, plan) == [[8, 8], [9, 9]]  # an engine is whole on a node


def test_engines_alone_are_whole_on_a_node() -> None:
    placement = place_engines(CPU, 2, 3)
    assert (placement.bundles, placement.engine_bundles) == ([{"CPU": 3.0}] * 2, [[0] * 3, [1] * 3])
    placement = place_engines(CUDA, 1, 2)
    assert placement.bundles == [{"CPU": 2.0, "GPU": 2.0}]
    assert placement.options["engine"] == {"num_cpus": 1.0, "num_gpus": 1.0}


def test_every_group_has_its_bundles_on_gpus() -> None:
    """Those of the actor's first ranks, or its own before the engines'."""
    apart = place(
        CUDA,
        groups(4, critic=2, colocated=False),
        engines=1,
        engine_ranks=2,
        colocated=False,
        nodes=1,
    )
    assert apart.bundles == [{"GPU": 1.0, "CPU": 1.0}] * 6 + [{"GPU": 2.0, "CPU": 2.0}]
    assert (apart.groups["critic"], apart.engine_bundles) == ([4, 5], [[6, 6]])
    assert all(options["num_gpus"] == 1 for options in apart.options.values())
    beside = place(CUDA, groups(4, critic=2), engines=1, engine_ranks=2, colocated=True, nodes=1)
    assert beside.bundles == [{"GPU": 1.0, "CPU": 3.0}] * 4
    assert (beside.groups["critic"], beside.engine_bundles) == ([0, 1], None)
    assert 0.99 < sum(options["num_gpus"] for options in beside.options.values()) <= 1
    mixed = place(
        CUDA,
        groups(4, critic=2, colocated=False),
        engines=2,
        engine_ranks=2,
        colocated=True,
        nodes=1,
    )
    assert mixed.bundles == [{"GPU": 1.0, "CPU": 2.0}] * 4 + [{"GPU": 1.0, "CPU": 1.0}] * 2
    assert {name: options["num_gpus"] for name, options in mixed.options.items()} == {
        "actor": 0.5,
        "critic": 1.0,
        "engine": 0.5,
    }
    with pytest.raises(
        ValueError, match=r"critic.layout has 8 ranks .* more than the 4 of actor.layout"
    ):
        place(CUDA, groups(4, critic=8), engines=1, engine_ranks=2, colocated=True, nodes=1)


def test_devices_of_a_configuration_are_its_bundles() -> None:
    for placement in ("colocated", "disaggregated"):
        for of_critic in ("colocated", "disaggregated"):
            critic = CriticConfig(layout=LayoutConfig(dp=2), placement=of_critic)
            rollout = RolloutConfig(engines=2, tensor_parallel_size=2, placement=placement)
            config = Config(
                actor=ActorConfig(layout=LayoutConfig(tp=4)), critic=critic, rollout=rollout
            )
            groups = worker_groups(config)
            placed = place(CUDA, groups, 2, 2, placement == "colocated", 1)
            assert sum(count for _, count in device_terms(groups, rollout)) == placed.gpus


def test_too_many_colocated_engines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.engines = 9 .* 8 devices"):
        plan_sync(SPEC, LAYOUT, Sites.gpus(8, 8), 9, 1)
    assert len(plan_sync(SPEC, replace(LAYOUT, dp=1), Sites.hosts([0] * 4), 9, 1).destinations) == 1
