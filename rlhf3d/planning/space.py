"""The layouts, placements and batch cuts that a search looks at.

Invariant: enumerates only; whether a model allows a layout is asked of `check_layout`, whether a run accepts a
configuration of `rlhf3d.config.checks`. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import get_args

from rlhf3d.config.groups import parallel_layout
from rlhf3d.config.schema import Config, LayoutConfig, Recompute
from rlhf3d.models.engine_weights import check_engine_layout
from rlhf3d.models.spec import ModelSpec, check_layout
from rlhf3d.planning.hardware import Cluster

APART = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Shares of the devices that engines get where they have devices of their own."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Sequences of a micro-batch, or longest sequences that its token budget holds."""
INTERLEAVED = (1, 2, 4)
EXPERT_GROUPS = (1, 2, 4, 8, 16, 32, 64)


def on_cluster(config: Config, cluster: Cluster) -> Config:
    """The configuration with the cluster's nodes."""
    per_node = min(cluster.devices, cluster.devices_per_node)
    return replace(
        config, cluster=replace(config.cluster, platform="cuda", num_nodes=cluster.nodes, gpus_per_node=per_node)
    )


def engine_shares(cluster: Cluster) -> list[int]:
    """Devices that engines have to themselves: none (beside every training rank), or whole nodes of several."""
    unit = cluster.devices_per_node if cluster.nodes > 1 else 1
    return [
        0,
        *sorted({n for share in APART if 0 < (n := round(share * cluster.devices / unit) * unit) < cluster.devices}),
    ]


def rests(config: Config, apart: int) -> list[Config]:
    """Engines that stay awake or sleep, and then model states that stay on the device or wait in host memory."""
    if apart:
        return [replace(config, rollout=replace(config.rollout, sleep=False))]
    return [
        replace(config, rollout=replace(config.rollout, sleep=sleep), model=replace(config.model, offload=offload))
        for sleep, offload in ((False, False), (True, False), (True, True))
    ]


def layouts(spec: ModelSpec, devices: int, per_node: int) -> list[LayoutConfig]:
    """The layouts of so many devices that the model allows; tensor ranks stay in a node."""
    found = []
    for tp in _divisors(per_node):
        for pp in _divisors(devices // tp if devices % tp == 0 else 0):
            if pp > spec.num_layers:
                break
            for vpp in INTERLEAVED if pp > 1 else (1,):
                for first, last in _ends(spec.num_layers, pp, vpp):
                    base = LayoutConfig(
                        tp=tp, pp=pp, dp=devices // tp // pp, vpp=vpp if vpp > 1 else None,
                        sequence_parallel=tp > 1, overlap_grad_reduce=True,
                        first_stage_layers=first, last_stage_layers=last,
                    )  # fmt: skip
                    groups = EXPERT_GROUPS if spec.num_experts else (1,)
                    found += [layout for ep in groups if _legal(spec, layout := replace(base, ep=ep))]
    return found


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
    longest = config.data.max_prompt_length + config.data.max_response_length
    longest = -(-longest // layout.tp) * layout.tp
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
    return [n for n in _divisors(most) if ranks % n == 0 and _engine_legal(spec, n, expert_parallel)]


@cache
def _engine_legal(spec: ModelSpec, tp: int, expert_parallel: bool) -> bool:
    try:
        check_engine_layout(spec, tp, expert_parallel)
    except ValueError:
        return False
    return True
