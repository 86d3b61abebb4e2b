"""Weights by the table, without a model: numbered tensors cut for any layout, and put together again.

Invariant: every element of a made tensor is a different number, so that a block in the wrong place shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import LocalParam, box_slices, hf_tensors, local_params
from rlhf3d.parallel.layout import ParallelLayout


def numbered_tensors(spec: ModelSpec, version: int = 0) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor of the policy in float32, no two elements alike (below 2^24 of them)."""
    start, tensors = 1 + version, {}
    for name, shape in hf_tensors(spec, "lm").items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float32).view(shape)
        start += count
    return tensors


def cut(tensors: Mapping[str, torch.Tensor], params: Iterable[LocalParam]) -> dict[str, torch.Tensor]:
    """The parameters that a table describes, padding zero."""
    made = {}
    for param in params:
        made[param.name] = torch.zeros(param.shape)
        for piece in param.pieces:
            made[param.name][box_slices(piece.local_box)] = tensors[piece.hf_name][box_slices(piece.hf_box)]
    return made


def rank_params(
    tensors: Mapping[str, torch.Tensor], spec: ModelSpec, layout: ParallelLayout, rank: int
) -> dict[tuple[int, str], torch.Tensor]:
    """(chunk, name) -> weights of a training rank."""
    at = layout.coords(rank)
    return {
        (chunk, name): weight
        for chunk in range(layout.vpp)
        for name, weight in cut(tensors, local_params(spec, layout, at, chunk)).items()
    }
