"""A model as megatron-core stores it: Hugging Face tensor <-> block of a stored tensor.

Invariant: a checkpoint's tensors do not depend on the layout that wrote it, except for the rows
that pad the vocabulary. They are the weight table of one rank, each kind of parameter stacked over
layers and experts, or, as Megatron-LM's trainer saves since megatron-core 0.15
(`singleton_local_shards`), under a key of its own. Pure: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from rlhf3d.models.boxes import Box, Piece, inside, intersect, locate
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head, LocalParam, local_params
from rlhf3d.parallel.layout import ParallelLayout

WRAPPER_PREFIX = "module."
"""Megatron's data-parallel wrapper, if it was saved with the model, puts this before each key."""
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors whose last rows may be padding."""
OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
"""How the keys of an optimizer's tensors begin; those of one of several optimizers are numbered."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.linear_fc(\d)\.weight(\d+)")
_WITH_EXTRA_STATE = re.compile(r"(.*\.(?:linear_\w+|\w+_layernorm))\.weight")


@dataclass(frozen=True)
class Slab:
    """One parameter of one layer (and expert): `place` in the stack of the tensor `key`."""

    key: str
    place: tuple[int, ...]
    """Layer and expert, as far as the tensor is stacked over them."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Their `local_box` is in the parameter, without the stack's dimensions."""

    def is_in(self, box: Box) -> bool:
        """Whether the block `box` of the stored tensor has elements of this parameter."""
        # The stack's dimensions come first in a tensor; zip ends with them.
        lead = zip(self.place, box, strict=False)
        return all(start <= i < stop for i, (start, stop) in lead)

    def overlaps(self, box: Box) -> Iterator[Overlap]:
        """Give the blocks of Hugging Face tensors in the block `box` of the stored tensor."""
        lead = len(self.place)
        # Where a chunk holds several layers, this parameter is one row of it.
        row = tuple(i - start for i, (start, _) in zip(self.place, box[:lead], strict=True))
        for piece in self.pieces:
            part = intersect(piece.local_box, box[lead:])
            if part is not None:
                # `locate` goes from the first box of a piece to the second: here, back.
                back = Piece(piece.hf_name, piece.local_box, piece.hf_box)
                index: tuple[int | slice, ...] = (*row, *inside(part, box[lead:]))
                yield Overlap(piece.hf_name, locate(back, part), index)


@dataclass(frozen=True)
class Overlap:
    """A block of a Hugging Face tensor, and its index in a chunk."""

    hf_name: str
    hf_box: Box
    index: tuple[int | slice, ...]


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a checkpoint, by key without prefix. A Hugging Face tensor is in one slab."""

    shapes: Mapping[str, tuple[int, ...]]
    slabs: tuple[Slab, ...]

    def extra_states(self) -> list[str]:
        """Names of the (empty) objects that Megatron with Transformer Engine expects.

        It stores one next to each linear layer and norm.
        """
        names = []
        for slab in self.slabs:
            if match := _WITH_EXTRA_STATE.fullmatch(slab.key):
                lead = len(slab.place)
                place = ".".join(map(str, slab.place)) or "0"
                # Megatron names an object by its place and its grid: shard_3_24 is layer 3 of 24.
                stack = ".".join(map(str, self.shapes[slab.key][:lead])) or "1"
                names.append(f"{match[1]}._extra_state/shard_{place}_{stack}")
        return names


@dataclass(frozen=True)
class KeyStyle:
    """What is stored under its own keys instead of stacked; here, when written, nothing."""

    layers: bool = False
    experts: bool = False
    gates: bool = False
    """The two halves of a gated first layer: `…linear_fc1.weight_w` (gate) and `…_v` (up)."""

    def metadata(self) -> dict[str, bool]:
        """What asks Megatron's sharded_state_dict for these keys."""
        return {"singleton_local_shards": self.gates, "non_homogeneous_layers": self.layers}


def key_style(keys: Iterable[str]) -> KeyStyle:
    """The style of a folder's keys."""
    keys = list(keys)
    return KeyStyle(
        layers=any(_LAYER.fullmatch(key) for key in keys),
        experts=any(".experts.experts.0." in key for key in keys),
        gates=any(key.endswith("linear_fc1.weight_w") for key in keys),
    )


def stored_model(spec: ModelSpec, head: Head, style: KeyStyle | None = None) -> StoredModel:
    """What a checkpoint of the model holds."""
    # The table of a layout with one rank has every tensor uncut, which is how they are stored.
    layout, style = ParallelLayout(), style or KeyStyle()
    # The names of Transformer Engine's layer spec are those of every spec's checkpoints.
    table = local_params(spec, layout, layout.coords(0), 0, head, "te")
    slabs, shapes = [], {}
    for param in table:
        key, place, stack = _stacked(param.name, spec, style)
        is_gated = style.gates and "linear_fc1.weight" in key
        for suffix, part in _halves(param) if is_gated else [("", param)]:
            shapes[key + suffix] = (*stack, *part.shape)
            slabs.append(Slab(key + suffix, place, part.shape, part.pieces))
    return StoredModel(shapes, tuple(slabs))


def _stacked(
    name: str, spec: ModelSpec, style: KeyStyle
) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Key of a parameter, its place in the stack, and the stack's size."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name, (), ()
    prefix, lead, full = "decoder.layers.", [int(layer[1])], [spec.num_layers]
    if style.layers:
        prefix, lead, full = f"{prefix}{layer[1]}.", [], []
    expert = _EXPERT.fullmatch(layer[2])
    if expert is None:
        return f"{prefix}{layer[2]}", tuple(lead), tuple(full)
    prefix += "mlp.experts.experts."
    if style.experts:
        prefix += f"{expert[2]}."
    else:
        lead, full = [*lead, int(expert[2])], [*full, spec.num_experts]
    return f"{prefix}linear_fc{expert[1]}.weight", tuple(lead), tuple(full)


def _halves(param: LocalParam) -> Iterator[tuple[str, LocalParam]]:
    """The gate and the up projection of a gated first layer, by the suffix of their keys."""
    # Gate and up are stacked by rows, gate first: [2 x ffn, hidden].
    rows = param.shape[0] // 2
    for suffix, start in (("_w", 0), ("_v", rows)):
        pieces = []
        for piece in param.pieces:
            (first, last), *columns = piece.local_box
            if start <= first < start + rows:
                assert last <= start + rows, f"{param.name}: {piece} crosses gate and up"
                pieces.append(replace(piece, local_box=((first - start, last - start), *columns)))
        yield suffix, replace(param, shape=(rows, *param.shape[1:]), pieces=tuple(pieces))


def differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every tensor that is missing, extra or of the wrong shape.

    Further rows that may pad a vocabulary are accepted.
    """
    lines = [
        f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found
    ]
    lines += [f"extra: {name} {list(shape)}" for name, shape in found.items() if name not in wanted]
    for name, shape in wanted.items():
        if name in found and found[name] != shape and not _padded(name, shape, found[name]):
            lines.append(f"misshapen: {name} is {list(found[name])}, the model's is {list(shape)}")
    return lines


def _padded(name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> bool:
    same_columns = found[1:] == wanted[1:] and len(found) == len(wanted)
    # Megatron pads a vocabulary so that tensor-parallel ranks get equal shares.
    return name in VOCABULARY_KEYS and same_columns and found[0] > wanted[0]
