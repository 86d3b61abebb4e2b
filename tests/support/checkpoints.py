"""Megatron folders as ranks of any layout write them, without ranks; and models as tensors.

Invariant: the chunks are those of the weight table of the layout, so that they differ from layout to layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf3d.checkpoints.stored import VOCABULARY_KEYS, KeyStyle, stored_model
from rlhf3d.checkpoints.torch_dist import Chunk, StoredTensor, finish_folder, write_tensors
from rlhf3d.models.boxes import box_slices, full_box, intersect, locate, volume
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
    """Each rank's own pieces as chunks of one file a rank; vocabularies padded for the layout."""
    folder.mkdir(parents=True)
    model = stored_model(spec, head, style)
    shapes = dict(model.shapes)
    for key in VOCABULARY_KEYS:
        if key in shapes:
            shapes[key] = (padded_vocab_size(spec, layout), spec.hidden_size)
    chunks: dict[str, list[Chunk]] = {key: [] for key in shapes}
    places = model.places()
    for rank in range(layout.world_size):
        blocks = []
        for chunk in range(layout.vpp):
            for param in local_params(spec, layout, layout.coords(rank), chunk, head):
                for piece in param.pieces if param.primary else ():
                    for key, place in places[piece.hf_name]:
                        part = intersect(piece.hf_box, place.hf_box)
                        if part is not None:
                            box = locate(place, part)
                            block = tensors[piece.hf_name][box_slices(part)].clone()
                            blocks.append((key, box, block.view([b - a for a, b in box])))
        for key, written in write_tensors(folder / f"__{rank}_0.distcp", blocks)[0]:
            chunks[key].append(written)
    padding = []
    for key in VOCABULARY_KEYS:
        if key in shapes and shapes[key][0] > spec.vocab_size:
            box = ((spec.vocab_size, shapes[key][0]), (0, spec.hidden_size))
            dtype = next(iter(tensors.values())).dtype
            padding.append(
                (
                    key,
                    box,
                    torch.zeros(shapes[key][0] - spec.vocab_size, spec.hidden_size, dtype=dtype),
                )
            )
    for key, written in write_tensors(folder / "__padding.distcp", padding)[0]:
        chunks[key].append(written)
    for key, shape in shapes.items():
        assert sum(volume(chunk.box) for chunk in chunks[key]) == volume(full_box(shape)), key
    dtype_of = {
        key: tensors[found[0].pieces[0].hf_name].dtype for key, found in _slabs(model).items()
    }
    stored = {
        f"{prefix}{key}": StoredTensor(dtype_of[key], shape, tuple(chunks[key]))
        for key, shape in shapes.items()
    }
    finish_folder(folder, stored, model.extra_states(), {})
    return folder


def _slabs(model):  # type: ignore[no-untyped-def]
    found = {}
    for slab in model.slabs:
        found.setdefault(slab.key, []).append(slab)
    return found


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
