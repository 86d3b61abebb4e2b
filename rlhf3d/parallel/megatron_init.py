"""Process groups of one training rank: torch.distributed, Megatron's groups and random states.

Invariant: after `initialize_megatron` this rank's coordinates in Megatron are `ParallelLayout`'s.
"""

from __future__ import annotations

import random
from datetime import timedelta

import megatron_patches
from rlhf3d.parallel.layout import ParallelLayout, RankCoords
from rlhf3d.parallel.meeting import host_meeting
from rlhf3d.parallel.platform import Platform


def initialize_megatron(
    layout: ParallelLayout,
    rank: int,
    seed: int,
    platform: Platform,
    timeout_s: float,
    *,
    master_addr: str = "127.0.0.1",
    master_port: int,
) -> None:
    """Join the world of `layout.world_size` ranks that meet at `master_addr:master_port`.

    `timeout_s` bounds the rendezvous and every collective. Raises torch's DistError when the world
    does not assemble, PatchError when Megatron cannot be patched.
    """
    megatron_patches.apply(platform.kind)
    import numpy as np
    import torch
    from megatron.core import parallel_state, tensor_parallel

    timeout = timedelta(seconds=timeout_s)
    # Does nothing except in the process that opened this port.
    host_meeting(master_port, timeout_s)
    torch.distributed.init_process_group(
        platform.dist_backend,
        init_method=f"tcp://{master_addr}:{master_port}",
        rank=rank,
        world_size=layout.world_size,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,  # an expert is on one rank, see models/weights.py
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    ours = RankCoords(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
    )
    assert ours == layout.coords(rank), (
        f"rank {rank}: Megatron says {ours}, layout {layout.coords(rank)}"
    )
    replica = parallel_state.get_expert_data_parallel_rank()
    assert replica == layout.expert_replica(ours), (
        f"rank {rank}: Megatron says expert replica {replica}"
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy_megatron() -> None:
    """Leave the world; this process may call `initialize_megatron` again."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
