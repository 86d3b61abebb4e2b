"""Bytes of a checkpoint.

Invariant: each shard of a trained model counts once. Pure: no torch.
"""

from __future__ import annotations

from functools import cache

from rlhf3d import units
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.planning.job import Job
from rlhf3d.planning.states import chunk_sizes


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of a checkpoint: every trained model, its optimizer if that is saved."""
    weights = sum(
        stored_elements(model.spec, model.layout, model.head, job.style)
        for model in job.models
        if model.trained
    )
    dtype, optimizer = job.config.model.dtype, job.config.trainer.save_optimizer
    return units.checkpoint_bytes(weights, dtype, optimizer)


@cache
def stored_elements(spec: ModelSpec, layout: ParallelLayout, head: Head, style: SpecStyle) -> int:
    """Return the weights of a model that a checkpoint holds: each shard once."""
    dense = experts = 0
    for pp in range(layout.pp):
        for chunk in range(layout.vpp):
            sizes = chunk_sizes(spec, layout, pp, chunk, head, style)
            experts += sum(sizes.experts)
            dense += sizes.total - sum(sizes.experts)
    # Parameters that tensor ranks replicate (norms) count once a rank: next to nothing of a model.
    return dense * layout.tp + experts * layout.ep
