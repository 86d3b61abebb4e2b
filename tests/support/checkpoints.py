"""Megatron folders as ranks of any layout write them, without ranks; and models as tensors.

Invariant: the chunks are those of the weight table of the layout, so that they differ from layout
to layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf3d.checkpoints.stored import VOCABULARY_KEYS, KeyStyle, StoredModel, stored_model
from rlhf3d.checkpoints.torch_dist import Block, write_folder
from rlhf3d.models.boxes import Box, Piece, box_slices, intersect, locate
from rlhf3d.models.spec import ModelSpec, padded_vocab_size
from rlhf3d.models.weights import Head, local_params
from rlhf3d.parallel.layout import ParallelLayout


def write_megatron_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    layout: ParallelLayout,
    head: Head = "lm",
    prefix: str = "",
    style: KeyStyle | None = None,
) -> Path:
    """Each rank's own pieces as chunks of one file per rank; vocabularies padded for the layout."""
    folder.mkdir(parents=True)
    model = stored_model(spec, head, style)
    shapes = dict(model.shapes)
    for key in VOCABULARY_KEYS:
        if key in shapes:
            shapes[key] = (padded_vocab_size(spec, layout), spec.hidden_size)
    values: dict[Block, torch.Tensor] = {}
    files = []
    for rank in range(layout.world_size):
        files.append([])
        for piece in _rank_pieces(spec, layout, rank, head):
            for key, box, part in _stored_boxes(model, piece):
                tensor = tensors[piece.hf_name]
                block = Block(prefix + key, box, tensor.dtype, shapes[key])
                files[-1].append(block)
                sizes = [stop - start for start, stop in box]
                values[block] = tensor[box_slices(part)].reshape(sizes)
    dtype = next(iter(tensors.values())).dtype
    files.append([])
    for key in VOCABULARY_KEYS:
        if key in shapes and shapes[key][0] > spec.vocab_size:
            box = ((spec.vocab_size, shapes[key][0]), (0, spec.hidden_size))
            block = Block(prefix + key, box, dtype, shapes[key])
            files[-1].append(block)
            values[block] = torch.zeros([stop - start for start, stop in box], dtype=dtype)
    write_folder(folder, files, values.__getitem__, model.extra_states())
    return folder


def _rank_pieces(spec: ModelSpec, layout: ParallelLayout, rank: int, head: Head) -> Iterator[Piece]:
    """The pieces that a rank writes."""
    for chunk in range(layout.vpp):
        for param in local_params(spec, layout, layout.coords(rank), chunk, head):
            yield from param.pieces if param.primary else ()


def _stored_boxes(model: StoredModel, piece: Piece) -> Iterator[tuple[str, Box, Box]]:
    """Key and box of the stored tensor, and box of the Hugging Face tensor, of each common
    block.
    """
    for slab in model.slabs:
        for place in slab.pieces:
            if place.hf_name == piece.hf_name:
                part = intersect(piece.hf_box, place.hf_box)
                if part is not None:
                    lead = tuple((i, i + 1) for i in slab.place)
                    yield slab.key, (*lead, *locate(place, part)), part


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, as the safetensors library reads it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and torch.equal(
            one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)
        )
        for name in one
    )
