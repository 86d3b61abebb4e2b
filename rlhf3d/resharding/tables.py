"""The weight tables that a plan is made from: training shards, engines, or complete tensors.

Invariant: everything a plan knows about a model comes through here from the tables of
`rlhf3d.models`. Pure: no torch.
"""

from __future__ import annotations

from collections import defaultdict

from rlhf3d.models.boxes import Piece, full_box
from rlhf3d.models.engine_weights import engine_params
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import LocalParam, hf_tensors, local_params
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.resharding.plan import ReshardPlan, TrainingShards, build_plan
from rlhf3d.resharding.sites import Sites


def training_shards(
    spec: ModelSpec, layout: ParallelLayout, style: SpecStyle = "local"
) -> TrainingShards:
    """The policy's distinct shards under `layout`, which must have passed `check_layout`."""
    holders: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        at = layout.coords(rank)
        # Ranks that differ only in dp or cp hold the same weights.
        holders[at.pp, at.tp, at.ep].append(rank)

    def table_of(rank: int, chunk: int) -> tuple[LocalParam, ...]:
        return tuple(local_params(spec, layout, layout.coords(rank), chunk, "lm", style))

    tables = []
    for ranks in holders.values():  # all of them have the same table
        tables.append(tuple(table_of(ranks[0], chunk) for chunk in range(layout.vpp)))
    return TrainingShards(tuple(tables), tuple(map(tuple, holders.values())))


def engine_tables(
    spec: ModelSpec, tensor_parallel_size: int, expert_parallel: bool = False
) -> list[list[LocalParam]]:
    """vLLM's parameters by tensor-parallel rank.

    Raises ValueError as `check_engine_layout` does.
    """
    return [
        engine_params(spec, tensor_parallel_size, rank, expert_parallel)
        for rank in range(tensor_parallel_size)
    ]


def complete_tensors(spec: ModelSpec) -> list[LocalParam]:
    """Every Hugging Face tensor as a parameter of its own: what an export takes."""
    return [
        LocalParam(name, shape, (Piece(name, full_box(shape), full_box(shape)),), primary=True)
        for name, shape in hf_tensors(spec, "lm").items()
    ]


def plan_sync(
    spec: ModelSpec,
    layout: ParallelLayout,
    sites: Sites,
    engines: int,
    tensor_parallel_size: int,
    *,
    colocated: bool = True,
    expert_parallel: bool = False,
    style: SpecStyle = "local",
) -> ReshardPlan:
    """The plan from the policy under `layout` to `engines` vLLM engines.

    Raises ValueError as its parts do.
    """
    tables = engine_tables(spec, tensor_parallel_size, expert_parallel)
    return build_plan(training_shards(spec, layout, style), tables, sites, engines, colocated)


def plan_export(
    spec: ModelSpec,
    layout: ParallelLayout,
    sites: Sites,
    style: SpecStyle = "local",
    beside: int = 0,
) -> ReshardPlan:
    """The plan from the policy under `layout` to one reader of complete tensors.

    The reader is on the device of rank `beside`.
    """
    # One engine of one rank, put where its reader is instead of where the bytes are.
    shards, devices = training_shards(spec, layout, style), [(sites.device_of_rank[beside],)]
    return build_plan(
        shards, [complete_tensors(spec)], sites, engines=1, colocated=True, devices=devices
    )
