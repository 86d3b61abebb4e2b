"""The training side of a weight sync: each rank writes its own slices, once.

Invariant: the slices of all ranks are exactly those of the staging plan; no tensor is gathered anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import local_params
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.staging import Slice, StagingArea, StagingPlan

if TYPE_CHECKING:
    from rlhf3d.engine.megatron_engine import MegatronEngine


def planned_slices(spec: ModelSpec, layout: ParallelLayout) -> list[Slice]:
    """What all ranks of the policy together write: every HF tensor, each element once."""
    return [
        (piece.hf_name, piece.hf_box)
        for rank in range(layout.world_size)
        for chunk in range(layout.vpp)
        for param in local_params(spec, layout, layout.coords(rank), chunk)
        if param.primary
        for piece in param.pieces
    ]


@torch.no_grad()
def stage_weights(engine: MegatronEngine, plan: StagingPlan, path: str, policy_version: int) -> int:
    """Write this rank's slices of the policy's weights for `policy_version`; bytes written."""
    area = StagingArea.open(plan, path)
    written = 0
    try:
        for name, box, tensor in engine.export_pieces():
            area.write(name, box, tensor, policy_version)
            written += tensor.numel() * plan.tensors[name].dtype.itemsize
    finally:
        area.close()
    return written
