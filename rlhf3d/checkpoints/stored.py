"""A model as megatron-core stores it: Hugging Face tensor <-> block of a global tensor, for every layout at once.

Invariant: a checkpoint's tensors do not depend on the layout that wrote it, but for the rows that pad the vocabulary:
they are the weight table of one rank, each kind of parameter stacked over layers and experts, or, as Megatron-LM's
trainer saves since megatron-core 0.15 (`singleton_local_shards`), under a key of its own. Pure: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

from rlhf3d.models.boxes import Box, Piece, full_box
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head, LocalParam, hf_tensors, local_params
from rlhf3d.parallel.layout import ParallelLayout

WRAPPER_PREFIX = "module."
"""What Megatron's data-parallel wrapper, where it was saved with the model, puts before every key."""
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors whose last rows may be padding."""
OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
"""How the keys of an optimizer's tensors begin; those of one of several optimizers are numbered."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.linear_fc(\d)\.weight(\d+)")
_WITH_EXTRA_STATE = re.compile(r"(.*\.(?:linear_\w+|\w+_layernorm))\.weight")


@dataclass(frozen=True)
class Slab:
    """One parameter of one layer (and expert) at `box` in the stacked tensor `key`, and its pieces there."""

    key: str
    box: Box
    pieces: tuple[Piece, ...]

    @property
    def lead(self) -> int:
        """Dimensions of the stack."""
        return len(self.box) - len(self.pieces[0].hf_box)


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a checkpoint, by key without prefix."""

    shapes: Mapping[str, tuple[int, ...]]
    slabs: tuple[Slab, ...]

    def places(self) -> dict[str, list[tuple[str, Piece]]]:
        """Hugging Face name -> its pieces with their keys."""
        found: dict[str, list[tuple[str, Piece]]] = {}
        for slab in self.slabs:
            for piece in slab.pieces:
                found.setdefault(piece.hf_name, []).append((slab.key, piece))
        return found

    def extra_states(self) -> list[str]:
        """Names of the (empty) objects that Megatron with Transformer Engine stores beside linear layers and norms, and
        wants back."""
        return [
            f"{match[1]}._extra_state/shard_{lead}_{whole}"
            for slab in self.slabs
            if (match := _WITH_EXTRA_STATE.fullmatch(slab.key))
            for lead in [".".join(str(start) for start, _ in slab.box[: slab.lead]) or "0"]
            for whole in [".".join(map(str, self.shapes[slab.key][: slab.lead])) or "1"]
        ]


@dataclass(frozen=True)
class KeyStyle:
    """What has keys of its own in a folder; by default, and where this framework writes, nothing."""

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
    layout, style = ParallelLayout(), style or KeyStyle()
    table = local_params(
        spec, layout, layout.coords(0), 0, head, "te"
    )  # the names of every layer spec's checkpoints
    slabs, shapes = [], {}
    for param in table:
        key, lead, full = _stacked(param.name, spec, style)
        for suffix, part in (
            _halves(param) if style.gates and "linear_fc1.weight" in key else [("", param)]
        ):
            shapes[key + suffix] = (*full, *part.shape)
            slabs.append(_slab(key + suffix, tuple((i, i + 1) for i in lead), part))
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
    """The gate's and the up projection's rows of a gated first layer, by the suffix of their keys."""
    rows = param.shape[0] // 2
    for suffix, start in (("_w", 0), ("_v", rows)):
        pieces = []
        for piece in param.pieces:
            (first, last), *columns = piece.local_box
            if start <= first < start + rows:
                assert last <= start + rows, f"{param.name}: {piece} crosses gate and up"
                pieces.append(replace(piece, local_box=((first - start, last - start), *columns)))
        yield suffix, replace(param, shape=(rows, *param.shape[1:]), pieces=tuple(pieces))


def _slab(key: str, lead: Box, param: LocalParam) -> Slab:
    pieces = tuple(
        Piece(piece.hf_name, piece.hf_box, lead + piece.local_box) for piece in param.pieces
    )
    return Slab(key, lead + full_box(param.shape), pieces)


def differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every tensor that is missing, extra or of the wrong shape; further rows that may pad a vocabulary are neither."""
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
    return name in VOCABULARY_KEYS and same_columns and found[0] > wanted[0]


def files_of(sizes: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Names in order, cut into runs of at most `limit_bytes` (or of one name that is larger)."""

    def numbered() -> Iterator[tuple[int, str]]:
        file = filled = 0
        for name, size in sizes.items():
            if filled and filled + size > limit_bytes:
                file, filled = file + 1, 0
            filled += size
            yield file, name

    return [
        [name for _, name in group] for _, group in groupby(numbered(), key=lambda pair: pair[0])
    ]


def parameters(spec: ModelSpec, head: Head) -> int:
    """Number of weights."""
    return sum(prod(shape) for shape in hf_tensors(spec, head).values())
