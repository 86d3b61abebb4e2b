"""Bundles of a run, and which of them engine ranks take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf3d.config.groups import WorkerGroup, device_terms, worker_groups
from rlhf3d.config.schema import ActorConfig, Config, CriticConfig, LayoutConfig, RolloutConfig
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.placement.resources import engine_bundles, place
from rlhf3d.resharding.sites import Sites
from rlhf3d.resharding.tables import plan_sync

CPU, CUDA = CPUPlatform(reason="test"), CUDAPlatform(reason="test")
SPEC = ModelSpec(
    "llama", num_layers=4, hidden_size=32, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=64, vocab_size=128
)
LAYOUT = ParallelLayout(tp=2, pp=2, dp=2)


def groups(tp: int, critic: int = 0, colocated: bool = True) -> list[WorkerGroup]:
    """An actor group of `tp` ranks, and a critic group of `critic` where there is one."""
    actor = WorkerGroup("actor", "actor.layout", ("actor",), "model", LayoutConfig(tp=tp))
    own = WorkerGroup("critic", "critic.layout", ("critic",), "model", LayoutConfig(dp=critic), colocated)
    return [actor, own] if critic else [actor]


def test_cpu_engine_ranks_have_their_own_bundles() -> None:
    placement = place(CPU, groups(tp=4), engines=2, engine_ranks=2, colocated=True)
    assert placement.bundles == [{"CPU": 1.0}] * 8
    assert placement.engine_bundles == [[4, 5], [6, 7]]


def test_cuda_engines_share_the_trainers_gpus() -> None:
    placement = place(CUDA, groups(tp=8), engines=4, engine_ranks=2, colocated=True)
    assert placement.bundles == [{"GPU": 1.0, "CPU": 2.0}] * 8
    assert placement.options["actor"]["num_gpus"] + placement.options["engine"]["num_gpus"] == 1
    plan = plan_sync(SPEC, LAYOUT, Sites.gpus(8, 8), 4, 2)
    bundles = engine_bundles(placement, plan, [0] * 8)
    assert sorted(bundle for ranks in bundles for bundle in ranks) == list(range(8))
    # Each engine rank is where the tensor-parallel half it needs is.
    assert all(LAYOUT.coords(bundle).tp == rank for ranks in bundles for rank, bundle in enumerate(ranks))


def test_cuda_engines_apart_have_gpus_of_their_own() -> None:
    placement = place(CUDA, groups(tp=8), engines=2, engine_ranks=2, colocated=False)
    assert placement.bundles == [{"GPU": 1.0, "CPU": 1.0}] * 12
    plan = plan_sync(SPEC, LAYOUT, Sites.gpus(8, 8), 2, 2, colocated=False)
    assert engine_bundles(placement, plan, [0] * 8 + [1] * 4) == [[8, 9], [10, 11]]


def test_every_group_has_its_bundles() -> None:
    """On CPU in any case its own; on GPUs those of the actor's first ranks, or its own before the engines'."""
    for colocated in (True, False):
        cpu = place(CPU, groups(4, critic=2, colocated=colocated), engines=1, engine_ranks=2, colocated=True)
        assert cpu.bundles == [{"CPU": 1.0}] * 8
        assert cpu.groups == {"actor": [0, 1, 2, 3], "critic": [4, 5]}
        assert cpu.engine_bundles == [[6, 7]]
    apart = place(CUDA, groups(4, critic=2, colocated=False), engines=1, engine_ranks=2, colocated=False)
    assert apart.bundles == [{"GPU": 1.0, "CPU": 1.0}] * 8
    assert (apart.groups["critic"], apart.engine_bundles) == ([4, 5], [[6, 7]])
    assert all(options["num_gpus"] == 1 for options in apart.options.values())
    beside = place(CUDA, groups(4, critic=2), engines=1, engine_ranks=2, colocated=True)
    assert beside.bundles == [{"GPU": 1.0, "CPU": 3.0}] * 4
    assert (beside.groups["critic"], beside.engine_bundles) == ([0, 1], None)
    assert 0.99 < sum(options["num_gpus"] for options in beside.options.values()) <= 1
    mixed = place(CUDA, groups(4, critic=2, colocated=False), engines=2, engine_ranks=2, colocated=True)
    assert mixed.bundles == [{"GPU": 1.0, "CPU": 2.0}] * 4 + [{"GPU": 1.0, "CPU": 1.0}] * 2
    assert {name: options["num_gpus"] for name, options in mixed.options.items()} == {
        "actor": 0.5, "critic": 1.0, "engine": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"critic.layout has 8 ranks .* more than the 4 of actor.layout"):
        place(CUDA, groups(4, critic=8), engines=1, engine_ranks=2, colocated=True)


def test_devices_of_a_configuration_are_its_bundles() -> None:
    for placement in ("colocated", "disaggregated"):
        for of_critic in ("colocated", "disaggregated"):
            critic = CriticConfig(layout=LayoutConfig(dp=2), placement=of_critic)
            rollout = RolloutConfig(engines=2, tensor_parallel_size=2, placement=placement)
            config = Config(actor=ActorConfig(layout=LayoutConfig(tp=4)), critic=critic, rollout=rollout)
            placed = place(CUDA, worker_groups(config), 2, 2, placement == "colocated")
            assert sum(count for _, count in device_terms(config)) == len(placed.bundles)


def test_cpu_engines_go_to_the_hosts_of_the_plan() -> None:
    placement = place(CPU, groups(tp=8), engines=2, engine_ranks=1, colocated=True)
    plan = plan_sync(SPEC, LAYOUT, Sites.hosts([0] * 4 + [1] * 4), 2, 1)
    assert [d.device for d in plan.destinations] == [0, 1]
    assert engine_bundles(placement, plan, [0] * 4 + [1] * 4 + [1, 0]) == [[9], [8]]
    with pytest.raises(ValueError, match=r"no room for the engine ranks .* node 0; .* disaggregated"):
        engine_bundles(placement, plan, [0] * 4 + [1] * 4 + [1, 1])


def test_too_many_colocated_engines_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.engines = 9 .* 8 devices"):
        plan_sync(SPEC, LAYOUT, Sites.gpus(8, 8), 9, 1)
    assert len(plan_sync(SPEC, replace(LAYOUT, dp=1), Sites.hosts([0] * 4), 9, 1).destinations) == 1
