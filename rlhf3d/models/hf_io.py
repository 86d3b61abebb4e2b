"""Hugging Face folders on disk: read any block of any tensor, write a model's files.

Invariant: only the bytes asked for are read, through a mapping of the file, and nothing is
unpickled. Nothing is written that is not all of the announced model; writing holds one tensor in
memory, and what `NewFile` collects.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlhf3d.disk import NewFile
from rlhf3d.models.boxes import Box, box_slices, full_box, row_boxes
from rlhf3d.models.folder import INDEX_NAME, is_weights, model_tensors, weight_files
from rlhf3d.models.spec import FAMILIES, ModelSpec
from rlhf3d.models.weights import Head, check_hf_tensors
from rlhf3d.tokenizer.load import replace_template
from rlhf3d.units import GIB, MIB

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of weights, by the name a safetensors header gives them."""
BLOCK_BYTES = 16 * MIB
"""How much of a tensor is looked at at a time."""


class HFReader:
    """Blocks of the tensors of the files that are the model (see `weight_files`).

    Raises ValueError naming the file that is missing, cut off or not of the model's weights, after
    the name of the option (`option`) that gave the folder.
    """

    def __init__(self, folder: Path | str, option: str = "model.path: ") -> None:
        self.folder, self._option = Path(folder), option
        self._handles: dict[Path, Any] = {}
        try:
            files = weight_files(self.folder)
            self._tensors = model_tensors(files)
        except ValueError as error:
            raise ValueError(f"{option}{error}") from error
        self.notes = files.notes

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, from the header."""
        return DTYPES[self._tensors[name].dtype]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._tensors[name].file

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The block of tensor `name` inside `box` (None: all of it), in the file's dtype.

        It is a view of the file where that is possible: copy it to change it.
        """
        box = full_box(self.shape(name)) if box is None else box
        block: torch.Tensor = self._open(self.file(name)).get_slice(name)[box_slices(box)]
        return block

    def _open(self, file: Path) -> Any:
        # Opening reads and checks the whole header, so a file is opened once.
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{self._option}cannot read {file} ({error}); download it again"
                ) from error
        return self._handles[file]

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()


def check_weights(folder: Path | str, spec: ModelSpec, head: Head) -> None:
    """Raise ValueError naming model.path unless the folder holds all of its config.json's model."""
    _check_config_class(Path(folder))
    with HFReader(folder) as reader:
        check_hf_tensors({name: reader.shape(name) for name in reader.names()}, spec, head, folder)
        if head == "lm":
            check_tied_head(reader, spec)


def _check_config_class(folder: Path) -> None:
    """Raise ValueError if transformers' class, which vLLM builds too, refuses a config.json."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its checks and a wrong value may raise anything
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(
            f"model.path: transformers does not read {folder}/config.json: {reason}; correct it"
        ) from error


def check_tied_head(reader: HFReader, spec: ModelSpec) -> None:
    """Raise ValueError where a tied vocabulary head is written out and is not the embedding.

    transformers would use such a head, and vLLM would ignore it.
    """
    names = FAMILIES[spec.family].names
    if not spec.tie_embeddings or not {names.lm_head, names.embedding} <= set(reader.names()):
        return
    if not _same_rows(reader, names.lm_head, names.embedding):
        raise ValueError(
            f"model.path: {reader.folder} has tie_word_embeddings true, but a {names.lm_head} of "
            f"its own, which is not {names.embedding}: set it to false in config.json where that "
            "head is the model's, or remove the tensor"
        )


def _same_rows(reader: HFReader, one: str, other: str) -> bool:
    """Whether two matrices hold the same values, whatever their dtypes."""
    if reader.shape(one) != reader.shape(other):
        return False
    for box in row_boxes(reader.shape(one), 8, BLOCK_BYTES):
        # Every dtype of weights fits into float64.
        if not torch.equal(reader.read(one, box).double(), reader.read(other, box).double()):
            return False
    return True


def copy_in_range(out: torch.Tensor, block: torch.Tensor, what: str) -> None:
    """Copy into another dtype.

    Raises ValueError that begins with `what` where a finite value would become infinite.
    """
    out.copy_(block)
    # Most loads end here, without looking at the values.
    if out.dtype == block.dtype or torch.finfo(out.dtype).max >= torch.finfo(block.dtype).max:
        return
    if bool((out.isinf() & block.isfinite()).any()):
        name = str(out.dtype).removeprefix("torch.")
        # NaN and infinities count as 0: they are not what became too large.
        largest = float(block.abs().nan_to_num(0, 0).max())
        raise ValueError(
            f"{what} of {largest:g}, beyond the range of {name}: choose a dtype with more range"
        )


@contextmanager
def model_view(folder: Path | str) -> Iterator[Path]:
    """Give a folder with only the model's files (links), for libraries that would choose others."""
    folder = Path(folder).resolve()
    files = weight_files(folder)
    if not files.notes and (len(files.names) == 1 or (folder / INDEX_NAME).is_file()):
        yield folder  # nothing else to choose: and caches that go by the path know it again
        return
    with tempfile.TemporaryDirectory(prefix="rlhf3d-model-") as view:
        # Names may have a subfolder in them.
        for name in (*files.names, *companions(folder)):
            (Path(view) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(view) / name).symlink_to(folder / name)
        if len(files.names) > 1:
            weight_map = {name: info.file.name for name, info in model_tensors(files).items()}
            (Path(view) / INDEX_NAME).write_text(
                json.dumps({"metadata": {}, "weight_map": weight_map})
            )
        yield Path(view)


Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def write_model(
    folder: Path,
    forms: Mapping[str, Form],
    tensors: Iterable[tuple[str, torch.Tensor]],
    source_folder: Path,
    max_shard_gib: float = 4.0,
    chat_template: str | None = None,
) -> list[NewFile]:
    """Write `tensors` as safetensors files, with config and tokenizer of `source_folder`, into a
    folder that is there; the files of weights, which are on disk. The caller syncs the others.

    `forms` says by name what will come, in this order, and `tensors` are written one at a time.
    `chat_template` takes the place of those of `source_folder`.
    """
    written = _write_shards(folder, forms, tensors, int(max_shard_gib * GIB))
    copy_companions(source_folder, folder)
    if chat_template is not None:
        replace_template(folder, chat_template)
    record_dtype(folder / "config.json", {dtype for _, dtype in forms.values()})
    return written


def copy_companions(source_folder: Path, destination: Path) -> None:
    """Copy all but the weights: configuration, tokenizer and its code, templates, license."""
    for name in companions(source_folder):
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source_folder / name, destination / name)


def companions(folder: Path) -> list[str]:
    """Names of a model folder's files that are no weights, those of its subfolders included.

    Hidden files and folders that hold weights (of another model) are not the model's.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir():
            if not any(is_weights(file.name) for file in path.rglob("*")):
                found += [f"{path.name}/{name}" for name in companions(path)]
        elif path.is_file() and not is_weights(path.name):
            found.append(path.name)
    return found


def _write_shards(
    folder: Path,
    forms: Mapping[str, Form],
    tensors: Iterable[tuple[str, torch.Tensor]],
    limit_bytes: int,
) -> list[NewFile]:
    """Write the files: one without an index if all fits in one."""
    shards = _plan_shards(forms, limit_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        _write_index(folder / INDEX_NAME, forms, dict(zip(names, shards, strict=True)))
    coming, written = iter(tensors), []
    for name, shard in zip(names, shards, strict=True):
        with closing(NewFile(folder / name)) as file:
            file.write(_header({tensor: forms[tensor] for tensor in shard}))
            for wanted in shard:
                # Not kept while the next one is made.
                _write_tensor(file, wanted, forms[wanted], next(coming, None))
            file.sync()
        written.append(file)
    extra = next(coming, None)
    assert extra is None, f"{extra[0]} is not to be written, or was written already"
    return written


def _write_tensor(
    file: NewFile, wanted: str, form: Form, came: tuple[str, torch.Tensor] | None
) -> None:
    """Append the tensor that is to come next."""
    assert came is not None, f"{wanted} never came"
    name, tensor = came
    assert name == wanted, f"{name} came where {wanted} was announced"
    assert (tuple(tensor.shape), tensor.dtype) == form, f"{name} has another form"
    # Through uint8: numpy has no bfloat16.
    values = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
    file.write(memoryview(values.numpy()))


def _plan_shards(forms: Mapping[str, Form], limit_bytes: int) -> list[list[str]]:
    """The names of each file's tensors, of at most `limit_bytes` unless a tensor alone is more."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, form in forms.items():
        if shards[-1] and used + _num_bytes(form) > limit_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += _num_bytes(form)
    return shards


def _num_bytes(form: Form) -> int:
    shape, dtype = form
    return prod(shape) * dtype.itemsize


def _write_index(path: Path, forms: Mapping[str, Form], shards: Mapping[str, list[str]]) -> None:
    weight_map: dict[str, str] = {}
    for file_name, names in shards.items():
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(map(_num_bytes, forms.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2) + "\n")


def _header(forms: Mapping[str, Form]) -> bytes:
    """The head of a safetensors file whose tensors follow in this order.

    The safetensors library writes a file from tensors that are all in memory; this format (length
    of the header in 8 bytes, JSON, values) is simple enough to write them one at a time.
    """
    names_of_dtypes = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, form in forms.items():
        start, end = end, end + _num_bytes(form)
        shape, dtype = form
        offsets = [start, end]
        entries[name] = {
            "dtype": names_of_dtypes[dtype],
            "shape": list(shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8, as the library has it
    return len(text).to_bytes(8, "little") + text


def record_dtype(config_file: Path, dtypes: set[torch.dtype]) -> None:
    """Make the config's dtype the one written, so that loaders with dtype `auto` keep it."""
    if len(dtypes) != 1:
        return
    config = json.loads(config_file.read_text())
    # transformers 4 wrote `torch_dtype`, 5 writes `dtype`; two of them could contradict each other.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(next(iter(dtypes))).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
