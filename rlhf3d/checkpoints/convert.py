"""Megatron checkpoint <-> Hugging Face folder: no GPU, no process group.

Invariant: every tensor of the destination is filled from the source exactly once, bit for bit
unless another dtype is asked for; tensors that are missing, extra or of the wrong shape end the
conversion before anything is written. Memory does not grow with the model: to Hugging Face it holds
two parameters of a layer and one chunk; to Megatron, one chunk of at most CHUNK_BYTES of each file
that is being written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from rlhf3d.checkpoints.locate import (
    Role,
    kind_of,
    megatron_folder,
    reference_folder,
    run_template,
)
from rlhf3d.checkpoints.manifest import Manifest, infos_below, versions, write_manifest
from rlhf3d.checkpoints.sharded import METADATA
from rlhf3d.checkpoints.stored import (
    VOCABULARY_KEYS,
    WRAPPER_PREFIX,
    Overlap,
    Slab,
    StoredModel,
    differences,
    key_style,
    stored_model,
)
from rlhf3d.checkpoints.torch_dist import Block, Chunk, TorchDistReader, write_folder
from rlhf3d.models.boxes import Box, box_slices, row_boxes, volume
from rlhf3d.models.hf_io import (
    HFReader,
    check_tied_head,
    copy_companions,
    copy_in_range,
    record_dtype,
    write_model,
)
from rlhf3d.models.spec import FAMILIES, ModelSpec, architecture, load_spec
from rlhf3d.models.weights import Head, hf_tensors, num_weights, refuse_odd_names
from rlhf3d.new_folder import new_folder
from rlhf3d.units import GIB, MIB

T = TypeVar("T")
To = Literal["hf", "megatron"]
OnBytes = Callable[[int], None]
"""Called with the number of bytes that were just converted."""
DTYPES = {
    "stored": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
HEADS: dict[Role, Head] = {"actor": "lm", "critic": "value"}
CHUNK_BYTES = 256 * MIB
"""Larger parameters are stored in several chunks: a loader holds one at a time."""
PARALLEL_FILES, PARALLEL_BYTES = 4, 64 * MIB
"""A Megatron folder has at least that many files, as long as each has that many bytes: several are
written at a time, and several loaded."""
LISTED = 20
"""Tensors that a message lists."""


class MismatchError(ValueError):
    """The tensors of a source are not those of its model: all in `lines`, some in the message."""

    def __init__(self, source: Path, lines: list[str]) -> None:
        self.lines = lines
        listed = lines[:LISTED]
        if len(lines) > LISTED:
            listed.append(f"and {len(lines) - LISTED} more")
        super().__init__(
            f"{source} does not hold the model that its config.json describes; "
            f"{len(lines)} tensors differ:\n  " + "\n  ".join(listed)
        )


@dataclass(frozen=True)
class Options:
    """How to convert."""

    to: To | None = None
    """None: the format that the source does not have."""
    role: Role | None = None
    """None: the actor, or the only model of the source."""
    dtype: str = "stored"
    max_shard_gib: float = 4.0
    reference: Path | None = None
    """Folder with config.json and tokenizer, for a source without them."""


@dataclass(frozen=True)
class Conversion:
    """A checked conversion; `run` does it."""

    source: Path
    destination: Path
    reference: Path
    to: To
    role: Role
    spec: ModelSpec
    num_bytes: int
    """Of all tensors, as written."""
    write: Callable[[Path, OnBytes], None] = field(repr=False)
    """Writes everything into a folder."""
    notes: tuple[str, ...] = ()
    """What the user should know of the source."""

    @property
    def num_weights(self) -> int:
        """Numbers in all tensors."""
        return num_weights(self.spec, HEADS[self.role])

    def pair(self, written: Path) -> tuple[Path, Path]:
        """The Megatron and the Hugging Face folder; `written` holds the destination's files."""
        return (self.source, written) if self.to == "hf" else (written / self.role, self.source)

    def run(
        self,
        on_bytes: OnBytes = lambda count: None,
        check: Callable[[Path], None] = lambda written: None,
    ) -> None:
        """Write the destination. `check` may raise before the written folder gets its name."""
        with new_folder(self.destination, self.num_bytes) as folder:
            self.write(folder, on_bytes)
            check(folder)


def plan_conversion(source: Path, destination: Path, options: Options) -> Conversion:
    """Compare source and model; nothing is written yet. Raises ValueError, MismatchError."""
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: it is {' or '.join(DTYPES)}")
    if options.max_shard_gib <= 0:
        raise ValueError(f"--max-shard-size {options.max_shard_gib}: it must be more than 0")
    # The format that the source is not in; runs and checkpoints hold Megatron folders.
    to = options.to or ("megatron" if kind_of(source) == "hf" else "hf")
    if to == "hf":
        return _to_hf(source, destination, options)
    if options.reference is not None:
        raise ValueError(
            "--reference would be ignored: a Hugging Face folder has its own config.json and "
            "tokenizer"
        )
    return _to_megatron(source, destination, options)


# Megatron -> Hugging Face


class MegatronSource:
    """The Hugging Face tensors of a Megatron folder, whatever layout wrote it."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.folder, self.spec, self.reader = folder, spec, TorchDistReader(folder)
        self.keys = {key.removeprefix(WRAPPER_PREFIX): key for key in self.reader.weight_keys()}
        self.role: Role = "critic" if "value_head.weight" in self.keys else "actor"
        self.style = key_style(self.keys)
        self.model = stored_model(self.spec, HEADS[self.role], self.style)
        stored = {key: self.reader.tensors[name] for key, name in self.keys.items()}
        shapes = {key: tensor.shape for key, tensor in stored.items()}
        # Shapes are compared before any value is read: a wrong config.json costs no time.
        if problems := differences(self.model.shapes, shapes):
            raise MismatchError(folder, problems)
        self.shapes = hf_tensors(self.spec, HEADS[self.role])
        self.dtypes: dict[str, torch.dtype] = {}
        for slab in self.model.slabs:
            for piece in slab.pieces:
                self.dtypes[piece.hf_name] = stored[slab.key].dtype
        self._chunks = self._chunks_by_layer()
        self.notes = tuple(self._left_out_rows())
        """What is left out of the tensors."""

    def _left_out_rows(self) -> Iterator[str]:
        """Rows beyond the vocabulary that are not zero.

        A trainer never zeroed its padding, or the configuration lacks tokens that were added.
        """
        vocabulary, hidden = self.spec.vocab_size, self.spec.hidden_size
        for key in VOCABULARY_KEYS:
            rows = self.reader.tensors[self.keys[key]].shape[0] if key in self.keys else 0
            if rows <= vocabulary:
                continue
            extra = self.reader.read(self.keys[key], ((vocabulary, rows), (0, hidden)))
            if extra.any():
                yield (
                    f"left out {rows - vocabulary} rows of {key} that are not zero, beyond the "
                    f"vocabulary of {vocabulary}: padding of the trainer; if tokens were added to "
                    "the model, give --reference the folder whose config.json and tokenizer have "
                    "them"
                )

    def _chunks_by_layer(self) -> dict[tuple[str, tuple[int, ...]], list[Chunk]]:
        """Index the chunks, of which there can be many thousands, by key and (if stacked) layer."""
        stacked = {slab.key for slab in self.model.slabs if slab.place}
        found: dict[tuple[str, tuple[int, ...]], list[Chunk]] = {}
        for key, stored_key in self.keys.items():
            for chunk in self.reader.tensors[stored_key].chunks:
                # Dimension 0 of a stacked tensor is the layer: a chunk with several is listed under
                # each of them.
                layers = [(i,) for i in range(*chunk.box[0])] if key in stacked else [()]
                for layer in layers:
                    found.setdefault((key, layer), []).append(chunk)
        return found

    def chunks(self, slab: Slab) -> list[Chunk]:
        """The chunks that hold a parameter."""
        # The index is by layer only; of an expert's layer `is_in` picks the expert.
        near = self._chunks[slab.key, slab.place[:1]]
        return [chunk for chunk in near if slab.is_in(chunk.box)]

    def names(self) -> list[str]:
        """The Hugging Face tensors, in the order in which `tensors` gives them."""
        found: dict[str, None] = {}
        for slab in self.model.slabs:
            for chunk in self.chunks(slab):
                found |= dict.fromkeys(part.hf_name for part in slab.overlaps(chunk.box))
        return list(found)

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Give each Hugging Face tensor, in `dtype` or (None) as stored."""
        for slab in self.model.slabs:
            tensors: dict[str, Tensor] = {}
            filled = 0
            for chunk in self.chunks(slab):
                values = self.reader.read_chunk(chunk)
                what = f"{self.folder / chunk.file} holds a value"
                for part in slab.overlaps(chunk.box):
                    self._put(tensors, part, values[part.index], dtype, what)
                    filled += volume(part.hf_box)
            names = {piece.hf_name for piece in slab.pieces}  # a tensor may come in several
            wanted = sum(prod(self.shapes[name]) for name in names)
            assert filled == wanted, f"{slab.key} {slab.place}: {filled} of {wanted} elements"
            for name in list(tensors):
                yield name, tensors.pop(name)  # only the receiver holds it from here on

    def _put(
        self,
        tensors: dict[str, Tensor],
        part: Overlap,
        block: Tensor,
        dtype: torch.dtype | None,
        what: str,
    ) -> None:
        """Put a block that was read into its tensor among `tensors`."""
        name, shape = part.hf_name, self.shapes[part.hf_name]
        # As it lies in the file. Not from a chunk of several layers, which would stay in memory.
        is_chunk = block.untyped_storage().nbytes() == block.nbytes
        if is_chunk and block.shape == shape and dtype in (None, block.dtype):
            tensors[name] = block
            return
        if name not in tensors:
            # Not zeroed: the caller's count proves that every element is written.
            tensors[name] = torch.empty(shape, dtype=dtype or self.dtypes[name])
        copy_in_range(tensors[name][box_slices(part.hf_box)], block, what)


def _to_hf(source: Path, destination: Path, options: Options) -> Conversion:
    folder = megatron_folder(source, options.role)
    reference = reference_folder(folder, options.reference)
    megatron = MegatronSource(folder, load_spec(reference, with_weights=False))
    if options.role not in (None, megatron.role):
        raise ValueError(f"{folder} holds a {megatron.role}, not a {options.role}")
    dtype, template = DTYPES[options.dtype], run_template(folder, reference)
    forms = {
        name: (megatron.shapes[name], dtype or megatron.dtypes[name]) for name in megatron.names()
    }

    def tensors(on_bytes: OnBytes) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in one_ahead(megatron.tensors(dtype)):
            on_bytes(tensor.nbytes)
            yield name, tensor

    def write(partial: Path, on_bytes: OnBytes) -> None:
        write_model(partial, forms, tensors(on_bytes), reference, options.max_shard_gib, template)
        write_role(partial / "config.json", megatron.role)

    return Conversion(
        source=folder,
        destination=destination,
        reference=reference,
        to="hf",
        role=megatron.role,
        spec=megatron.spec,
        num_bytes=sum(prod(shape) * dtype.itemsize for shape, dtype in forms.values()),
        write=write,
        notes=megatron.notes,
    )


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Make the next item in a thread while the last one is used: here, read while one is written.

    Holds two items at a time.
    """
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def write_role(config_file: Path, role: Role) -> None:
    """Make config.json say which head the weights next to it have."""
    config = json.loads(config_file.read_text())
    head: Literal["CausalLM", "SequenceClassification"] = (
        "CausalLM" if role == "actor" else "SequenceClassification"
    )
    config["architectures"] = [architecture(config["model_type"], head)]
    # Left over from the model that the run began with: they would say another number of labels.
    for key in ("num_labels", "id2label", "label2id"):
        config.pop(key, None)
    if role == "critic":  # transformers counts labels by these
        config |= {"id2label": {"0": "value"}, "label2id": {"value": 0}}
    config_file.write_text(json.dumps(config, indent=2) + "\n")


# Hugging Face -> Megatron


@dataclass(frozen=True)
class HFSource:
    """A Hugging Face folder that holds exactly its model."""

    reader: HFReader
    spec: ModelSpec
    role: Role
    names: tuple[str, ...]
    """Its tensors, without a tied head that is written out."""


def open_hf(folder: Path, role: Role | None) -> HFSource:
    """Open a folder. ValueError names the file that is missing or damaged, or (MismatchError)
    lists the tensors that are not the model's.
    """
    spec, reader = load_spec(folder), HFReader(folder, option="")
    shapes = {name: reader.shape(name) for name in reader.names()}
    names = FAMILIES[spec.family].names
    role = role or ("critic" if names.value_head in shapes else "actor")
    refuse_odd_names(shapes, spec, HEADS[role], folder)
    # A tied head that is written out is a copy of the embedding, which Megatron stores once.
    if spec.tie_embeddings and names.lm_head in shapes:
        check_tied_head(reader, spec)
        del shapes[names.lm_head]
    if problems := differences(hf_tensors(spec, HEADS[role]), shapes):
        raise MismatchError(folder, problems)
    return HFSource(reader, spec, role, tuple(shapes))


def _to_megatron(source: Path, destination: Path, options: Options) -> Conversion:
    if kind_of(source) != "hf":
        raise ValueError(
            f"{source} is a Megatron checkpoint already; give a Hugging Face folder, or --to hf"
        )
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{destination} would be one of the model's own files: "
            f"choose a folder outside of {source}"
        )
    hf = open_hf(source, options.role)
    model = stored_model(hf.spec, HEADS[hf.role])
    dtypes = _key_dtypes(model, hf.reader, DTYPES[options.dtype])
    # A plan of every chunk, without values: those are read when the chunk is written.
    slab_of: dict[Block, Slab] = {}
    for slab in model.slabs:
        for box in _chunk_boxes(slab, dtypes[slab.key].itemsize):
            block = Block(slab.key, box, dtypes[slab.key], model.shapes[slab.key])
            slab_of[block] = slab
    num_bytes = sum(block.num_bytes for block in slab_of)
    shared = max(num_bytes // PARALLEL_FILES, PARALLEL_BYTES)

    def write(partial: Path, on_bytes: OnBytes) -> None:
        def values(block: Block) -> Tensor:
            filled = _block_values(block, slab_of[block], hf.reader)
            on_bytes(filled.nbytes)
            return filled

        folder = partial / hf.role
        # The lower of the user's limit and the size that leaves enough files to write in parallel.
        files = _files(list(slab_of), min(int(options.max_shard_gib * GIB), shared))
        common = {"content_metadata": METADATA}
        written = write_folder(folder, files, values, model.extra_states(), common)
        TorchDistReader(folder)  # what was written can be read, and its chunks tile
        (partial / "hf").mkdir()
        copy_companions(source, partial / "hf")
        write_role(partial / "hf" / "config.json", hf.role)
        record_dtype(partial / "hf" / "config.json", set(dtypes.values()))
        infos = {f"{hf.role}/{name}": info for name, info in written.items()}
        manifest = Manifest(
            step=0,
            policy_version=0,
            models=(hf.role,),
            optimizer=False,
            versions=versions(),
            files=dict(sorted((infos | infos_below(partial, skip=[hf.role])).items())),
        )
        # Last: it names every other file.
        write_manifest(partial, manifest)

    return Conversion(
        source=source,
        destination=destination,
        reference=source,
        to="megatron",
        role=hf.role,
        spec=hf.spec,
        num_bytes=num_bytes,
        write=write,
        notes=hf.reader.notes,
    )


def _block_values(block: Block, slab: Slab, reader: HFReader) -> Tensor:
    parts = list(slab.overlaps(block.box))
    if len(parts) == 1 and reader.dtype(parts[0].hf_name) == block.dtype:
        # A block of the file as it lies there, in the stack's dimensions: nothing is copied.
        found = reader.read(parts[0].hf_name, parts[0].hf_box)
        return found.view([stop - start for start, stop in block.box])
    values = torch.empty([stop - start for start, stop in block.box], dtype=block.dtype)
    filled = 0
    for part in parts:
        what = f"{reader.file(part.hf_name)} holds a value"
        copy_in_range(values[part.index], reader.read(part.hf_name, part.hf_box), what)
        filled += volume(part.hf_box)
    assert filled == values.numel(), f"{block}: {filled} elements"
    return values


def _key_dtypes(
    model: StoredModel, reader: HFReader, wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Dtype of each stacked tensor. ValueError if its layers differ and none is asked for."""
    dtypes: dict[str, torch.dtype] = {}
    for slab in model.slabs:
        for piece in slab.pieces:
            dtype = wanted or reader.dtype(piece.hf_name)
            if dtypes.setdefault(slab.key, dtype) != dtype:
                raise ValueError(
                    f"{piece.hf_name} is {dtype}, other layers' are {dtypes[slab.key]}: "
                    "choose one with --dtype"
                )
    return dtypes


def _chunk_boxes(slab: Slab, itemsize: int) -> Iterator[Box]:
    """Cut a parameter by rows into chunks of at most CHUNK_BYTES."""
    lead = tuple((i, i + 1) for i in slab.place)
    # `slab.shape` has no stack dimensions; each chunk lies in one layer and expert.
    for rows in row_boxes(slab.shape, itemsize, CHUNK_BYTES):
        yield (*lead, *rows)


def _files(blocks: list[Block], limit_bytes: int) -> list[list[Block]]:
    """Put blocks, in order, into files of at most `limit_bytes` (or of one larger block)."""
    files: list[list[Block]] = [[]]
    filled = 0
    for block in blocks:
        if files[-1] and filled + block.num_bytes > limit_bytes:
            files.append([])
            filled = 0
        files[-1].append(block)
        filled += block.num_bytes
    return files
