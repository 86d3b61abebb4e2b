"""The layouts, placements and batch cuts that a search looks at.

Invariant: enumerates only; whether a model allows a layout is asked of `check_layout`, whether a run accepts a
configuration of `rlhf3d.config.checks`. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import get_args

from rlhf3d.config.derived import width_multiples
from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import Config, LayoutConfig
from rlhf3d.models.engine_weights import check_engine_layout
from rlhf3d.models.spec import ModelSpec, check_layout
from rlhf3d.parallel.layout import Recompute
from rlhf3d.planning.hardware import Cluster

APART = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Shares of the devices that engines get where they have devices of their own."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Sequences of a micro-batch, or longest sequences that its token budget holds."""
CONTEXT_RANK_TOKENS = 4096
"""Of the longest sequence a context-parallel rank gets at least so many: with less, its work is too small."""
INTERLEAVED = (1, 2, 4)
EXPERT_GROUPS = (1, 2, 4, 8, 16, 32, 64)


def on_cluster(config: Config, cluster: Cluster) -> Config:
    """The configuration with the cluster's nodes."""
    per_node = min(cluster.devices, cluster.devices_per_node)
    return replace(
        config,
        cluster=replace(
            config.cluster, platform="cuda", num_nodes=cluster.nodes, gpus_per_node=per_node
        ),
    )


def engine_shares(cluster: Cluster) -> list[int]:
    """Devices that engines have to themselves: none (beside every training rank), or whole nodes of several."""
    unit = cluster.devices_per_node if cluster.nodes > 1 else 1
    return [
        0,
        *sorted(
            {
                n
                for share in APART
                if 0 < (n := round(share * cluster.devices / unit) * unit) < cluster.devices
            }
        ),
    ]


def rests(config: Config, apart: int) -> list[Config]:
    """Engines that stay awake or sleep, and then model states that stay on the device or wait in host memory."""
    if apart:
        return [replace(config, rollout=replace(config.rollout, sleep=False))]
    return [
        replace(
            config,
            rollout=replace(config.rollout, sleep=sleep),
            model=replace(config.model, offload=offload),
        )
        for sleep, offload in ((False, False), (True, False), (True, True))
    ]


def layouts(spec: ModelSpec, devices: int, per_node: int, longest: int) -> list[LayoutConfig]:
    """The layouts of so many devices that the model allows, for sequences of `longest` tokens; tensor ranks stay in a
    node."""
    found = []
    for tp in _divisors(per_node):
        for pp in _divisors(devices // tp if devices % tp == 0 else 0):
            if pp > spec.num_layers:
                break
            replicas = devices // tp // pp
            for vpp in INTERLEAVED if pp > 1 else (1,):
                for first, last in _ends(spec.num_layers, pp, vpp):
                    base = LayoutConfig(
                        tp=tp, pp=pp, vpp=vpp if vpp > 1 else None,
                        sequence_parallel=tp > 1, overlap_grad_reduce=True, overlap_param_gather=True,
                        first_stage_layers=first, last_stage_layers=last,
                    )  # fmt: skip
                    groups = EXPERT_GROUPS if spec.num_experts else (1,)
                    for ep, cp in product(groups, _context_sizes(replicas, longest)):
                        layout = replace(base, ep=ep, cp=cp, dp=replicas // cp)
                        found += [layout] if _legal(spec, layout) else []
    return found


def _context_sizes(replicas: int, longest: int) -> list[int]:
    return [cp for cp in _divisors(replicas) if cp == 1 or longest // cp >= CONTEXT_RANK_TOKENS]


def longest_sequence(config: Config) -> int:
    """Tokens of a prompt and a response."""
    return config.data.max_prompt_length + config.data.max_response_length


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _ends(layers: int, pp: int, vpp: int) -> list[tuple[int | None, int | None]]:
    """Equal stages; where they do not come out, fewer layers on the first stage (embedding) and on the last (head)."""
    if layers % (pp * vpp) == 0:
        return [(None, None)]
    middle = -(-layers // (pp * vpp)) * vpp
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


def batchings(config: Config, layout: LayoutConfig) -> Iterator[Config]:
    """Actor and critic in one layout, by micro-batch size (in the configuration's unit) and recomputation."""
    chunks = width_multiples(layout, "cuda")["multiple_of"]
    longest = -(-longest_sequence(config) // chunks) * chunks
    as_actor = replace(
        config.critic,
        layout=None,
        use_dynamic_bsz=None,
        ppo_micro_batch_size_per_gpu=None,
        ppo_max_token_len_per_gpu=None,
    )
    for size in MICRO_BATCHES:
        for recompute in get_args(Recompute):
            actor = replace(
                config.actor,
                layout=replace(layout, recompute=recompute),
                ppo_micro_batch_size_per_gpu=size,
                ppo_max_token_len_per_gpu=size * longest,
            )
            yield replace(config, actor=actor, critic=as_actor)


def engine_sizes(spec: ModelSpec, ranks: int, most: int, expert_parallel: bool) -> list[int]:
    """Tensor-parallel sizes of engines, `most` or a divisor of it, that share out so many ranks."""
    return [
        n for n in _divisors(most) if ranks % n == 0 and _engine_legal(spec, n, expert_parallel)
    ]


@cache
def _engine_legal(spec: ModelSpec, tp: int, expert_parallel: bool) -> bool:
    try:
        check_engine_layout(spec, tp, expert_parallel)
    except ValueError:
        return False
    return True
