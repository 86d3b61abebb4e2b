"""Which files of a Hugging Face folder are the model's weights, and what their headers say.

Invariant: every reader (train, evaluate, convert, inspect) takes the same files, those that
transformers takes: model.safetensors, otherwise the files in model.safetensors.index.json. A folder
with two models is refused with both names; files that are not the model's are named and ignored.
Pure: no torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rlhf3d.paths import read_json, refuse_pointer
from rlhf3d.units import some

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""The dtypes of weights, by the name a safetensors header gives them."""
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# Neither loaded nor named in notes, but left out where a model's other files are copied.
_OF_OTHER_LIBRARIES = (".h5", ".msgpack", ".onnx", ".ot", ".distcp")


@dataclass(frozen=True)
class WeightFiles:
    """The files that are the model."""

    folder: Path
    names: tuple[str, ...]
    notes: tuple[str, ...]
    """What is in the folder and not of the model."""
    weight_map: dict[str, str]
    """File of each tensor according to the index; empty without one."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of any format, or is their index or settings."""
    endings = (*_WEIGHTS, *_OF_OTHER_LIBRARIES, ".index.json")
    return name.endswith(endings) or name == "adapter_config.json"


def weight_files(folder: Path) -> WeightFiles:
    """Choose the model's files. ValueError if there are none, one is missing, or for two models."""
    single, index = (folder / SINGLE_NAME).is_file(), folder / INDEX_NAME
    if single:
        # transformers prefers the single file and vLLM the index: both must mean one model.
        _refuse_second_model(folder, index)
        return _chosen(folder, [SINGLE_NAME], {})
    if index.is_file():
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
        # An interrupted download leaves the index without some of its files.
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {some(missing)}, {len(missing)} of the {len(names)} files that "
                f"{INDEX_NAME} names; download them"
            )
        return _chosen(folder, names, weight_map)
    return _chosen(folder, _shards_without_index(folder), {})


def _refuse_second_model(folder: Path, index: Path) -> None:
    """An index next to model.safetensors is left over, unless all files that it names are there."""
    try:
        shards = sorted(set(_weight_map(index).values()) - {SINGLE_NAME}) if index.is_file() else []
    except ValueError:
        return  # named among what is ignored
    if shards and all((folder / name).is_file() for name in shards):
        raise ValueError(
            f"{folder} holds two models: {SINGLE_NAME}, which transformers would load, and "
            f"{some(shards)} of {INDEX_NAME}, which vLLM would load; remove one of them"
        )


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index} has no weight_map of tensors and their files; download it again")
    for tensor, name in found.items():
        # A path could lead out of the folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{index} gives {name!r} as the file of {tensor}: a name in the same "
                "folder is needed"
            )
    return found


def _shards_without_index(folder: Path) -> list[str]:
    """The one complete set of numbered shards."""
    sets: dict[int, list[str]] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault(int(match[2]), []).append(path.name)
    if len(sets) > 1:
        first, second = (names[0] for names in list(sets.values())[:2])
        raise ValueError(
            f"{folder} holds the shards of two models ({first} and {second}) and no "
            f"{INDEX_NAME}; remove the old ones"
        )
    if not sets:
        raise ValueError(_no_weights(folder))
    ((count, names),) = sets.items()
    if len(names) != count:
        raise ValueError(
            f"{folder} has {len(names)} of {count} shards ({some(names)}); download the others"
        )
    return names


def _no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    broken = [path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    pickles = [name for name in others if not name.endswith((".safetensors", ".gguf"))]
    if broken:
        return (
            f"{folder}: {some(broken)} links to a file that is not there; download the model again"
        )
    if "adapter_model.safetensors" in others:
        return (
            f"{folder} holds an adapter (adapter_model.safetensors) and no model; merge it "
            "into its base model first (PeftModel.merge_and_unload, then save_pretrained)"
        )
    if pickles and len(pickles) == len(others):
        return (
            f"{folder} holds weights only as pickles ({pickles[0]}), which can run code; "
            "convert once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if others:
        return (
            f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; "
            f"{some(others)} is not what transformers loads"
        )
    return (
        f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}; "
        "download the weights next to config.json"
    )


def _chosen(folder: Path, names: list[str], weight_map: dict[str, str]) -> WeightFiles:
    ignored = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in names
        and (path.suffix in _WEIGHTS or path.name == "adapter_config.json")
    )
    if not weight_map and (folder / INDEX_NAME).is_file():
        ignored.append(INDEX_NAME)
    notes = (f"{folder}: not of the model and ignored: {', '.join(ignored)}",) if ignored else ()
    return WeightFiles(folder, tuple(names), notes, weight_map)


def model_tensors(files: WeightFiles) -> dict[str, TensorInfo]:
    """The tensors of the model's files, by name.

    ValueError names the file that is cut off, no safetensors file or not what the index says, and
    the tensor that is in two files or not of a floating-point dtype.
    """
    found: dict[str, TensorInfo] = {}
    for name in files.names:
        for tensor, info in read_header(files.folder / name).items():
            # A buffer in old folders; the loaders compute it from config.json.
            if tensor.endswith("rotary_emb.inv_freq"):
                continue
            if tensor in found:
                raise ValueError(
                    f"{tensor} is both in {found[tensor].file} and in {info.file}; "
                    "download them again"
                )
            if info.dtype not in DTYPE_BYTES:
                raise ValueError(
                    f"{info.file} holds {tensor} as {info.dtype}: weights are "
                    f"{', '.join(DTYPE_BYTES)}; give the original weights, not quantized ones"
                )
            found[tensor] = info
    lost = [
        name
        for name, file in files.weight_map.items()
        if name not in found and not name.endswith("inv_freq")
    ]
    if lost:
        raise ValueError(
            f"{files.folder / INDEX_NAME} names tensors that are not there: "
            f"{some(lost)} should be in {files.weight_map[lost[0]]}"
        )
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. ValueError names it if header and size do not agree."""
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            # A file of another kind may claim any length: no more is read than it has.
            text = file.read(length) if len(prefix) == 8 and length <= size else b""
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from error
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
    except (
        # A header can be any JSON, or none: whatever goes wrong in it means the same.
        AssertionError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path} is no safetensors file, or is cut off ({size} bytes); download it again"
        ) from error
    # A file is cut off or has grown where its last tensor does not end it.
    needed = max((stop for _, stop in entries.values()), default=8 + length)
    if size != needed:
        raise ValueError(f"{path} has {size} bytes, its header says {needed}: copy it again")
    return {name: info for name, (info, _) in entries.items()}


def _entry(path: Path, base: int, entry: dict[str, Any]) -> tuple[TensorInfo, int]:
    """A tensor and the byte after its last."""
    (start, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    # `type` is int, because True would pass isinstance.
    assert isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    assert dtype not in DTYPE_BYTES or stop - start == prod(shape) * DTYPE_BYTES[dtype]
    return TensorInfo(path, dtype, shape, base + start), base + stop
