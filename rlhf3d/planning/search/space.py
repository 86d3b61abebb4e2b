"""The layouts, placements and batch sizes that a search looks at.

Invariant: enumerates only; whether a model allows a layout is asked of `check_layout`, whether a
run accepts a configuration of `rlhf3d.config.checks`. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import get_args

from rlhf3d.config.derived import width_multiples
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import (
    ActorConfig,
    ClusterConfig,
    CriticConfig,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    RolloutConfig,
)
from rlhf3d.models.engine_weights import check_engine_layout
from rlhf3d.models.spec import ModelSpec, check_layout
from rlhf3d.parallel.layout import Recompute
from rlhf3d.planning.hardware import Cluster
from rlhf3d.units import ceil_div, round_up

ENGINE_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Shares of the devices that engines get where they have devices of their own, and wait while the
models train."""
BALANCING_SHARES = tuple(part / 16 for part in range(1, 16))
"""And where both work at the same time, so that a step is as long as the longer side."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Sequences of a micro-batch, or longest sequences that its token budget holds."""
CONTEXT_RANK_TOKENS = 4096
"""Least tokens of the longest sequence on a context-parallel rank: with less, its work is too
small."""
INTERLEAVED = (1, 2, 4)
EXPERT_GROUPS = (1, 2, 4, 8, 16, 32, 64)


def on_cluster(settings: ClusterConfig, cluster: Cluster) -> ClusterConfig:
    """Return the section with the cluster's nodes."""
    per_node = min(cluster.devices, cluster.devices_per_node)
    return replace(settings, platform="cuda", num_nodes=cluster.nodes, gpus_per_node=per_node)


def dedicated_counts(cluster: Cluster, rollout: RolloutConfig) -> list[int]:
    """Return how many devices engines may have to themselves.

    0, except in flight, where they need their own; with several nodes complete ones.
    """
    unit = cluster.devices_per_node if cluster.nodes > 1 else 1
    shares = BALANCING_SHARES if rollout.max_staleness else ENGINE_SHARES
    counts = {round(share * cluster.devices / unit) * unit for share in shares}
    dedicated = sorted(count for count in counts if 0 < count < cluster.devices)
    return dedicated if rollout.update == "in_flight" else [0, *dedicated]


def residences(
    model: ModelConfig, rollout: RolloutConfig, dedicated: int
) -> list[tuple[ModelConfig, RolloutConfig]]:
    """Return what may stay on the devices.

    Engines awake; engines asleep; neither those nor states. Engines that generate while the models
    train cannot sleep.
    """
    if dedicated:
        return [(model, replace(rollout, sleep=False))]
    choices = [(False, False), (True, False), (True, True)]
    if rollout.max_staleness:
        choices = [(False, False), (False, True)]
    return [
        (replace(model, offload=offload), replace(rollout, sleep=sleep))
        for sleep, offload in choices
    ]


def layouts(spec: ModelSpec, devices: int, per_node: int, longest: int) -> list[LayoutConfig]:
    """Return the layouts of `devices` that the model allows, for sequences of `longest` tokens.

    Tensor ranks stay in a node.
    """
    found = []
    for tp in _divisors(per_node):
        if devices % tp:
            continue
        for pp in _divisors(devices // tp):
            if pp <= spec.num_layers:
                for base in _pipelines(spec, tp, pp):
                    replicas = devices // tp // pp
                    found += _with_replicas(spec, base, replicas, longest)
    return found


def _pipelines(spec: ModelSpec, tp: int, pp: int) -> Iterator[LayoutConfig]:
    """Pipelines of `pp` stages, by how they are interleaved and how many layers their ends have."""
    for vpp in INTERLEAVED if pp > 1 else (1,):
        for first, last in _ends(spec.num_layers, pp, vpp):
            yield LayoutConfig(
                tp=tp,
                pp=pp,
                vpp=vpp if vpp > 1 else None,
                sequence_parallel=tp > 1,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                first_stage_layers=first,
                last_stage_layers=last,
            )


def _with_replicas(
    spec: ModelSpec, base: LayoutConfig, replicas: int, longest: int
) -> list[LayoutConfig]:
    """`base` with its replicas shared out over data, context and expert parallelism."""
    expert_groups = EXPERT_GROUPS if spec.num_experts else (1,)
    contexts = [cp for cp in _divisors(replicas) if cp == 1 or longest // cp >= CONTEXT_RANK_TOKENS]
    made = [
        replace(base, ep=ep, cp=cp, dp=replicas // cp)
        for ep, cp in product(expert_groups, contexts)
    ]
    return [layout for layout in made if _legal(spec, layout)]


def longest_sequence(data: DataConfig) -> int:
    """Return the tokens of the longest prompt and response."""
    return data.max_prompt_length + data.max_response_length


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _ends(layers: int, pp: int, vpp: int) -> list[tuple[int | None, int | None]]:
    """Layers of the first and the last stage; None where all stages have equally many.

    Where that does not come out, the first stage (embedding) and the last (head) have fewer.
    """
    if layers % (pp * vpp) == 0:
        return [(None, None)]
    # Middle stages get equal chunks, rounded up. The ends share what is left; the last one, which
    # has the head, gets the smaller part.
    middle = ceil_div(layers, pp * vpp) * vpp
    left = layers - (pp - 2) * middle
    half = left // 2 // vpp * vpp
    return [(left - half, half)] if pp > 2 and half > 0 else []


@cache
def _legal(spec: ModelSpec, layout: LayoutConfig) -> bool:
    try:
        check_layout(spec, parallel_layout(layout), layout.sequence_parallel)
    except ValueError:
        return False
    return True


def batch_sizes(
    actor: ActorConfig, critic: CriticConfig, layout: LayoutConfig, longest: int
) -> Iterator[tuple[ActorConfig, CriticConfig]]:
    """Yield actor and critic in one layout, by micro-batch size and recomputation.

    Micro-batches are in the configuration's own unit: sequences or tokens, of which a sequence has
    `longest` at most.
    """
    # A budget has to hold one longest row as it is rounded up for context and tensor ranks.
    chunks = width_multiples(layout, "cuda")["multiple_of"]
    longest = round_up(longest, chunks)
    # None: as the actor.
    as_actor = replace(
        critic,
        layout=None,
        use_dynamic_bsz=None,
        ppo_micro_batch_size_per_gpu=None,
        ppo_max_token_len_per_gpu=None,
    )
    for size, recompute in product(MICRO_BATCHES, get_args(Recompute)):
        sized = replace(
            actor,
            layout=replace(layout, recompute=recompute),
            # The run reads the one that actor.use_dynamic_bsz selects.
            ppo_micro_batch_size_per_gpu=size,
            ppo_max_token_len_per_gpu=size * longest,
        )
        yield sized, as_actor


def engine_sizes(spec: ModelSpec, ranks: int, most: int, expert_parallel: bool) -> list[int]:
    """Return the tensor-parallel sizes of engines, divisors of `most`, that share out `ranks`."""
    sizes = [size for size in _divisors(most) if ranks % size == 0]
    return [size for size in sizes if _engine_legal(spec, size, expert_parallel)]


@cache
def _engine_legal(spec: ModelSpec, tp: int, expert_parallel: bool) -> bool:
    try:
        check_engine_layout(spec, tp, expert_parallel)
    except ValueError:
        return False
    return True
