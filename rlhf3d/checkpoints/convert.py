"""Megatron checkpoint <-> Hugging Face folder, block by block: no GPU, no process group, no whole model in memory.

Invariant: every tensor of the destination is filled from the source exactly once, bit for bit unless another dtype is
asked for; tensors that are missing, extra or of the wrong shape end the conversion before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf3d.checkpoints.blocks import (
    BLOCK_BYTES,
    FileTensor,
    file_tensors,
    raw,
    row_blocks,
    safetensors_header,
)
from rlhf3d.checkpoints.files import PARTS, Advance, FileTask, building, write_files
from rlhf3d.checkpoints.locate import Role, kind_of, megatron_folder, reference_folder
from rlhf3d.checkpoints.manifest import FileInfo, Manifest, file_info, versions, write_manifest
from rlhf3d.checkpoints.sharded import METADATA
from rlhf3d.checkpoints.stored import (
    VOCABULARY_KEYS,
    WRAPPER_PREFIX,
    Slab,
    StoredModel,
    differences,
    files_of,
    key_style,
    stored_model,
)
from rlhf3d.checkpoints.torch_dist import (
    Chunk,
    StoredTensor,
    TorchDistReader,
    finish_folder,
    write_tensors,
)
from rlhf3d.models.boxes import Box, Piece, intersect, locate, volume
from rlhf3d.models.folder import INDEX_NAME, model_tensors, weight_files
from rlhf3d.models.hf_io import HFReader, check_tied_head, copy_companions, record_dtype
from rlhf3d.models.spec import FAMILIES, ModelSpec, architecture, load_spec
from rlhf3d.models.weights import Head, hf_tensors, refuse_odd_names

To = Literal["hf", "megatron"]
DTYPES = {
    "stored": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
HEADS: dict[Role, Head] = {"actor": "lm", "critic": "value"}
CHUNK_BYTES = 256 << 20
"""Larger parameters are stored in several chunks, which bounds what a writer and a loader hold."""
PARALLEL_FILES, PARALLEL_BYTES = 4, 64 << 20
"""A Megatron folder is cut into at least so many files, where they are not smaller than that: workers share them."""


LISTED = 20
"""Tensors that a message lists."""


class MismatchError(ValueError):
    """Source and model are not of one shape: every tensor in `lines`, the first of them in the message."""

    def __init__(self, source: Path, lines: list[str]) -> None:
        self.lines = lines
        listed = "\n  ".join(
            lines[:LISTED] + [f"and {len(lines) - LISTED} more"] * (len(lines) > LISTED)
        )
        super().__init__(
            f"{source} does not hold the model that its config.json describes; {len(lines)} tensors differ:\n  {listed}"
        )


@dataclass(frozen=True)
class Options:
    """How to convert."""

    to: To | None = None
    """None: what the source is not."""
    role: Role | None = None
    """None: the actor, or what the source is."""
    dtype: str = "stored"
    max_shard_gib: float = 4.0
    reference: Path | None = None
    """Folder with config.json and tokenizer, where the source does not tell."""


@dataclass(frozen=True)
class Conversion:
    """What is to be done; `run` does it."""

    source: Path
    destination: Path
    reference: Path
    to: To
    role: Role
    spec: ModelSpec
    tasks: list[FileTask] = field(repr=False)
    finish: Callable[[Path], None] = field(repr=False)
    """Writes what is not tensors, once all files are there."""
    plan: dict[str, Any] = field(repr=False)
    """What an interrupted conversion must share with the one that goes on."""
    notes: tuple[str, ...] = ()
    """What the user should know of the source."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(task.num_bytes for task in self.tasks)

    @property
    def head(self) -> Head:
        """What follows the trunk."""
        return HEADS[self.role]

    def pair(self, written: Path) -> tuple[Path, Path]:
        """The Megatron and the Hugging Face folder, where `written` holds the destination's files."""
        return (self.source, written) if self.to == "hf" else (written / self.role, self.source)

    def run(
        self,
        workers: int = 2,
        restart: bool = False,
        on_bytes: Advance = lambda count: None,
        check: Callable[[Path], None] = lambda written: None,
    ) -> None:
        """Write the destination; `on_bytes` is told of bytes written, from several threads.

        `check` may look at the written folder, and raise, before it gets its name.
        """
        with building(self.destination, self.plan, restart) as folder:
            write_files(folder, self.tasks, workers, on_bytes)
            self.finish(folder)
            check(folder)


def plan_conversion(source: Path, destination: Path, options: Options) -> Conversion:
    """Look at source and model, compare them, and say what is to be written. Raises ValueError, MismatchError."""
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: it is {' or '.join(DTYPES)}")
    if options.max_shard_gib <= 0:
        raise ValueError(f"--max-shard-size {options.max_shard_gib}: it must be more than 0")
    to = options.to or ("megatron" if kind_of(source) == "hf" else "hf")
    if to == "megatron" and options.reference is not None:
        raise ValueError(
            "--reference would be ignored: a Hugging Face folder has config.json and tokenizer of its own"
        )
    return (_to_hf if to == "hf" else _to_megatron)(source, destination, options)


# Megatron -> Hugging Face


class MegatronSource:
    """The Hugging Face tensors of a Megatron folder, whatever layout wrote it."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.folder, self.spec, self.reader = folder, spec, TorchDistReader(folder)
        keys = {key.removeprefix(WRAPPER_PREFIX): key for key in self.reader.weight_keys()}
        self.role: Role = "critic" if "value_head.weight" in keys else "actor"
        self.style = key_style(keys)
        self.model = stored_model(self.spec, HEADS[self.role], self.style)
        shapes = {key: self.reader.tensors[stored].shape for key, stored in keys.items()}
        if problems := differences(self.model.shapes, shapes):
            raise MismatchError(folder, problems)
        self.keys, self._places = keys, self.model.places()
        self.tensors = {
            name: (self.reader.tensors[keys[self._places[name][0][0]]].dtype, shape)
            for name, shape in hf_tensors(self.spec, HEADS[self.role]).items()
        }
        self.notes = tuple(self._cut_rows())
        """What is left out of the tensors."""

    def _cut_rows(self) -> Iterator[str]:
        """Rows beyond the vocabulary that hold something: a trainer that never zeroed its padding, or lost tokens."""
        vocabulary, hidden = self.spec.vocab_size, self.spec.hidden_size
        for key in VOCABULARY_KEYS:
            rows = self.reader.tensors[self.keys[key]].shape[0] if key in self.keys else 0
            if rows > vocabulary:
                extra = torch.empty(rows - vocabulary, hidden)
                self.reader.read_into(self.keys[key], ((vocabulary, rows), (0, hidden)), extra)
                if extra.any():
                    yield (
                        f"left out {rows - vocabulary} rows of {key} that are not zero, beyond the vocabulary of "
                        f"{vocabulary}: padding of the trainer; where tokens were added to the model, give "
                        "--reference the folder whose config.json and tokenizer have them"
                    )

    def read_into(self, name: str, box: Box, out: Tensor) -> None:
        """Copy the block `box` of a Hugging Face tensor into `out`."""
        filled = 0
        for key, piece in self._places[name]:
            part = intersect(piece.hf_box, box)
            if part is not None:
                stored = locate(piece, part)
                lead = (None,) * (len(stored) - len(part))
                self.reader.read_into(self.keys[key], stored, out[_inside(part, box)][lead])
                filled += volume(part)
        assert filled == volume(box), f"{name} {box}: {filled} elements"


def _inside(part: Box, box: Box) -> tuple[slice, ...]:
    """Index of `part` in a tensor that holds `box`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(part, box, strict=True))


def _to_hf(source: Path, destination: Path, options: Options) -> Conversion:
    folder = megatron_folder(source, options.role)
    reference = reference_folder(folder, options.reference)
    megatron = MegatronSource(folder, load_spec(reference, with_weights=False))
    if options.role not in (None, megatron.role):
        raise ValueError(f"{folder} holds a {megatron.role}, not a {options.role}")
    wanted = DTYPES[options.dtype]
    tensors = {name: (wanted or dtype, shape) for name, (dtype, shape) in megatron.tensors.items()}
    sizes = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in tensors.items()}
    files = files_of(sizes, int(options.max_shard_gib * 2**30))
    names = _safetensors_names(len(files))
    tasks = [
        FileTask(
            name,
            sum(sizes[t] for t in held),
            _safetensors_writer(megatron, {t: tensors[t] for t in held}),
        )
        for name, held in zip(names, files, strict=True)
    ]

    def finish(partial: Path) -> None:
        copy_companions(reference, partial)
        write_role(partial / "config.json", megatron.role)
        record_dtype(partial / "config.json", {dtype for dtype, _ in tensors.values()})
        if len(files) > 1:
            weight_map = {
                tensor: name for name, held in zip(names, files, strict=True) for tensor in held
            }
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    plan = _plan(folder, reference, "hf", megatron.role, options)
    return Conversion(
        folder,
        destination,
        reference,
        "hf",
        megatron.role,
        megatron.spec,
        tasks,
        finish,
        plan,
        megatron.notes,
    )


def _safetensors_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _safetensors_writer(
    source: MegatronSource, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Callable[[Path, Advance], None]:
    # Wider elements first, so that each tensor starts at a multiple of its element's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))

    def write(path: Path, advance: Advance) -> None:
        with open(path, "wb") as file:
            file.write(safetensors_header(ordered))
            for name, (dtype, shape) in ordered.items():
                buffer = torch.empty(0, dtype=dtype)
                for box in row_blocks(shape, dtype.itemsize, BLOCK_BYTES):
                    buffer.resize_([b - a for a, b in box])
                    source.read_into(name, box, buffer)
                    file.write(raw(buffer))
                    advance(buffer.nbytes)

    return write


def write_role(config_file: Path, role: Role) -> None:
    """Make config.json say which head the weights beside it have."""
    config = json.loads(config_file.read_text())
    head: Literal["CausalLM", "SequenceClassification"] = (
        "CausalLM" if role == "actor" else "SequenceClassification"
    )
    config["architectures"] = [architecture(config["model_type"], head)]
    for key in ("num_labels", "id2label", "label2id"):
        config.pop(key, None)
    if role == "critic":
        config |= {
            "id2label": {"0": "value"},
            "label2id": {"value": 0},
        }  # transformers counts labels by these
    config_file.write_text(json.dumps(config, indent=2) + "\n")


# Hugging Face -> Megatron


def open_hf(folder: Path) -> dict[str, FileTensor]:
    """The tensors of the files that are the model. ValueError naming the file that is missing or cut off."""
    return file_tensors(model_tensors(weight_files(folder)))


def hf_source(folder: Path, role: Role | None) -> tuple[ModelSpec, Role, dict[str, FileTensor]]:
    """Model, role and exactly its tensors. Raises MismatchError."""
    spec, found = load_spec(folder), open_hf(folder)
    names = FAMILIES[spec.family].names
    role = role or ("critic" if names.value_head in found else "actor")
    refuse_odd_names(found, spec, HEADS[role], folder)
    if spec.tie_embeddings and names.lm_head in found:
        with HFReader(folder) as reader:
            check_tied_head(reader, spec)
        del found[names.lm_head]  # written out though tied
    problems = differences(
        hf_tensors(spec, HEADS[role]), {name: tensor.shape for name, tensor in found.items()}
    )
    if problems:
        raise MismatchError(folder, problems)
    return spec, role, found


def _to_megatron(source: Path, destination: Path, options: Options) -> Conversion:
    if kind_of(source) != "hf":
        raise ValueError(
            f"{source} is a Megatron checkpoint already; give a Hugging Face folder, or --to hf"
        )
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{destination} would be one of the model's own files: choose a folder outside of {source}"
        )
    spec, role, found = hf_source(source, options.role)
    model, wanted = stored_model(spec, HEADS[role]), DTYPES[options.dtype]
    dtypes = _key_dtypes(model, found, wanted)
    chunks = {
        f"{slab.key} {box}": (slab, box)
        for slab in model.slabs
        for box in _chunk_boxes(slab, dtypes[slab.key].itemsize)
    }
    sizes = {name: volume(box) * dtypes[slab.key].itemsize for name, (slab, box) in chunks.items()}
    shared = max(sum(sizes.values()) // PARALLEL_FILES, PARALLEL_BYTES)
    files = files_of(sizes, min(int(options.max_shard_gib * 2**30), shared))
    tasks = [
        FileTask(
            f"{role}/__0_{i}.distcp",
            sum(sizes[name] for name in held),
            _distcp_writer(found, dtypes, [chunks[name] for name in held]),
        )
        for i, held in enumerate(files)
    ]

    def finish(partial: Path) -> None:
        known = _finish_megatron(partial, role, model, dtypes)
        (partial / "hf").mkdir(exist_ok=True)
        copy_companions(source, partial / "hf")
        write_role(partial / "hf" / "config.json", role)
        record_dtype(partial / "hf" / "config.json", set(dtypes.values()))
        names = [
            str(p.relative_to(partial)) for p in sorted(partial.rglob("*")) if _lasting(p, partial)
        ]
        files = {name: known.get(name) or file_info(partial / name) for name in names}
        write_manifest(
            partial, Manifest(0, 0, (role,), optimizer=False, versions=versions(), files=files)
        )

    plan = _plan(source, source, "megatron", role, options)
    notes = weight_files(source).notes
    return Conversion(
        source, destination, source, "megatron", role, spec, tasks, finish, plan, notes
    )


def _lasting(path: Path, partial: Path) -> bool:
    """Whether a file of the folder being built will be in the destination."""
    return path.is_file() and path.parent != partial and PARTS not in path.parts


def _key_dtypes(
    model: StoredModel, found: Mapping[str, FileTensor], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Dtype of each stacked tensor. ValueError where its layers differ and none is asked for."""
    dtypes: dict[str, torch.dtype] = {}
    for name, places in model.places().items():
        for key, _ in places:
            dtype = wanted or found[name].dtype
            if dtypes.setdefault(key, dtype) != dtype:
                raise ValueError(
                    f"{name} is {dtype}, other layers' are {dtypes[key]}: choose one with --dtype"
                )
    return dtypes


def _chunk_boxes(slab: Slab, itemsize: int) -> Iterator[Box]:
    """A slab cut by rows into chunks of at most CHUNK_BYTES."""
    lead, inner = slab.box[: slab.lead], slab.box[slab.lead :]
    return (
        (*lead, *rows)
        for rows in row_blocks(tuple(stop for _, stop in inner), itemsize, CHUNK_BYTES)
    )


def _distcp_writer(
    found: Mapping[str, FileTensor],
    dtypes: Mapping[str, torch.dtype],
    chunks: list[tuple[Slab, Box]],
) -> Callable[[Path, Advance], None]:
    def tensors(advance: Advance) -> Iterator[tuple[str, Box, Tensor]]:
        for slab, box in chunks:
            tensor = torch.empty([b - a for a, b in box], dtype=dtypes[slab.key])
            filled = 0
            for piece in slab.pieces:
                part = intersect(piece.local_box, box)
                if part is not None:
                    lead = len(part) - len(piece.hf_box)
                    back = Piece("", piece.local_box[lead:], piece.hf_box)
                    out = tensor[_inside(part, box)]
                    found[piece.hf_name].read_into(locate(back, part[lead:]), out[(0,) * lead])
                    filled += volume(part)
            assert filled == volume(box), f"{slab.key} {box}: {filled} elements"
            yield slab.key, box, tensor
            advance(tensor.nbytes)

    def write(path: Path, advance: Advance) -> None:
        notes = path.parent.parent / PARTS
        notes.mkdir(exist_ok=True)
        written, info = write_tensors(path, tensors(advance))
        final = path.name.removesuffix(".unfinished")
        chunks_there = [[key, asdict(chunk) | {"file": final}] for key, chunk in written]
        (notes / f"{final}.json").write_text(json.dumps({"info": info, "chunks": chunks_there}))

    return write


def _finish_megatron(
    partial: Path, role: Role, model: StoredModel, dtypes: Mapping[str, torch.dtype]
) -> dict[str, FileInfo]:
    """Write the index; size and checksum of each file of tensors."""
    chunks: dict[str, list[Chunk]] = {key: [] for key in model.shapes}
    known = {}
    for path in sorted((partial / PARTS).glob("*.json")):
        notes = json.loads(path.read_text())
        known[f"{role}/{path.stem}"] = FileInfo(*notes["info"])
        for key, chunk in notes["chunks"]:
            box = tuple((start, stop) for start, stop in chunk.pop("box"))
            chunks[key].append(Chunk(box, **chunk))
    tensors = {
        key: StoredTensor(dtypes[key], shape, tuple(chunks[key]))
        for key, shape in model.shapes.items()
    }
    finish_folder(partial / role, tensors, model.extra_states(), {"content_metadata": METADATA})
    TorchDistReader(partial / role)  # what was written can be read, and its chunks tile
    return known


def _plan(source: Path, reference: Path, to: To, role: Role, options: Options) -> dict[str, Any]:
    """What fixes every byte of the destination: the source's files as they are, and the options."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    return {
        "version": 1,
        "source": str(source.resolve()),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "config": sha256((reference / "config.json").read_bytes()).hexdigest(),
        "to": to,
        "role": role,
        "dtype": options.dtype,
        "max_shard_gib": options.max_shard_gib,
    }
