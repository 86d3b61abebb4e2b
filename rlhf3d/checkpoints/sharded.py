"""A rank's share of a checkpoint: model, optimizer and schedule through megatron-core's sharded format.

Invariant: what is written does not depend on the layout that wrote it (`fully_reshardable`): any layout can load it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from rlhf3d.engine.megatron_engine import MegatronEngine

# `distrib_optim_sharding_type` must be given: upstream's default raises on flattened tensors.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def _state(engine: MegatronEngine, optimizer: bool) -> dict[str, Any]:
    """The sharded state dict of one trainable model, with or without what only training needs."""
    chunks = engine.chunks
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    state: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=METADATA) for name, model in zip(names, engine.models, strict=True)
    }
    if not optimizer:
        return state
    state["optimizer"] = engine.optimizer.sharded_state_dict(dict(state), is_loading=False, metadata=METADATA)
    state["scheduler"] = engine.scheduler.state_dict()
    return state


def save_engines(folder: str, engines: dict[str, MegatronEngine], optimizer: bool) -> None:
    """Write each engine to `folder/<role>`; called on all ranks at once. The folder must be on shared storage."""
    from megatron.core import dist_checkpointing

    for role, engine in engines.items():
        path = Path(folder) / role
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(_state(engine, optimizer), str(path), content_metadata=METADATA)
        dist.barrier()
