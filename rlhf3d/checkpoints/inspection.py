"""What a run, checkpoint, Megatron folder or Hugging Face folder holds, and whether it is whole.

Invariant: only reads; every file that is missing, cut off or (looked at deeply) changed is named in `problems`, and a
manifest of another version is read for what it says, never guessed at.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

from rlhf3d.checkpoints.blocks import BLOCK_BYTES, InputFile
from rlhf3d.checkpoints.convert import MegatronSource, hf_source
from rlhf3d.checkpoints.locate import ROLES, checkpoints_of, kind_of, latest_checkpoint, reference_folder
from rlhf3d.checkpoints.torch_dist import TorchDistReader
from rlhf3d.models.spec import ModelSpec, load_spec


def inspect(path: Path, deep: bool = False) -> dict[str, Any]:
    """What `path` holds, as JSON; `problems` is empty where it is whole. ValueError where it is nothing known."""
    kind = kind_of(path)
    look = {"hf": _hf, "megatron": _megatron, "checkpoint": _checkpoint, "run": _run}[kind]
    found = {"path": str(path), "kind": kind, **look(path, deep)}
    return {**found, "problems": found.get("problems", [])}


def _run(path: Path, deep: bool) -> dict[str, Any]:
    steps = [int(p.name.removeprefix("step_")) for p in checkpoints_of(path)]
    unfinished = sorted(
        p.name for p in (path / "checkpoints").iterdir() if p.is_dir() and not (p / "manifest.json").is_file()
    )
    if not steps:
        return {"steps": steps, "unfinished": unfinished, "problems": [f"{path} has no complete checkpoint"]}
    latest = inspect(latest_checkpoint(path), deep)
    return {"steps": steps, "unfinished": unfinished, "latest": latest, "problems": latest["problems"]}


def _checkpoint(path: Path, deep: bool) -> dict[str, Any]:
    manifest_file = path / "manifest.json"
    try:
        manifest = json.loads(manifest_file.read_text())
        files = {name: _size_and_checksum(entry) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return {"problems": [f"{manifest_file} is missing: the checkpoint was not finished"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {"problems": [f"{manifest_file} is no manifest ({error!r})"]}
    problems = [text for name, entry in files.items() for text in _file_problems(path / name, *entry, deep)]
    found: dict[str, Any] = {key: value for key, value in manifest.items() if key != "files"}
    found |= {"bytes": sum(size for size, _ in files.values()), "files": len(files), "checksums": deep}
    found["layout"] = _layout(path)
    damaged = bool(problems)
    for part in (*ROLES, "hf"):
        weights = part in ROLES or any((path / part).glob("*.safetensors"))
        if (path / part).is_dir() and weights:
            # What the manifest found damaged need not be told again, in other words.
            held = inspect(path / part, deep and part != "hf" and not damaged)
            problems += [] if damaged else held.pop("problems")
            found[part] = held
    return found | {"problems": problems}


def _size_and_checksum(entry: Any) -> tuple[int, int | None]:
    """Of a manifest's entry: bytes alone, or bytes and CRC-32."""
    if isinstance(entry, dict):
        return int(entry["bytes"]), entry.get("crc32")
    return (int(entry[0]), int(entry[1])) if isinstance(entry, list) else (int(entry), None)


def _file_problems(path: Path, size: int, checksum: int | None, deep: bool) -> Iterable[str]:
    if not path.is_file():
        yield f"{path} is missing"
    elif path.stat().st_size != size:
        yield f"{path} has {path.stat().st_size} bytes, its manifest says {size}"
    elif deep and checksum is not None and _crc32(path) != checksum:
        yield f"{path} is not what was written: its checksum differs from its manifest's"


def _crc32(path: Path) -> int:
    file, checksum = InputFile(path), 0
    for start in range(0, file.size, BLOCK_BYTES):
        checksum = zlib.crc32(file.read(start, min(BLOCK_BYTES, file.size - start)), checksum)
    return checksum


def _layout(checkpoint: Path) -> dict[str, Any]:
    """What the run's configuration says of the layout, without what is off; empty where there is none."""
    import yaml

    config = checkpoint / "config.yaml"
    actor = (yaml.safe_load(config.read_text()) or {}).get("actor", {}) if config.is_file() else {}
    sizes = ("tp", "pp", "dp", "vpp", "ep", "first_stage_layers", "last_stage_layers")
    return {name: value for name in sizes if (value := (actor.get("layout") or {}).get(name)) is not None}


def _attempt(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except ValueError as error:
        return {"problems": [str(error)]}


def _megatron(path: Path, deep: bool) -> dict[str, Any]:
    return _attempt(lambda: _whole_megatron(path, deep))


def _whole_megatron(path: Path, deep: bool) -> dict[str, Any]:
    reader = TorchDistReader(path)
    weights = {key: tensor for key, tensor in reader.tensors.items() if not key.startswith("optimizer.")}
    found: dict[str, Any] = {
        "role": "critic" if any(key.endswith("value_head.weight") for key in weights) else "actor",
        "dtypes": _names({tensor.dtype for tensor in weights.values()}),
        "parameters": sum(prod(tensor.shape) for tensor in weights.values()),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "optimizer": len(weights) < len(reader.tensors),
        "chunks": len({chunk for tensor in weights.values() for chunk in tensor.chunks}),
    }
    try:
        reference = reference_folder(path, None)
    except ValueError:
        reference = None
    if reference is not None:
        source = MegatronSource(path, load_spec(reference, with_weights=False))
        found |= _model(source.spec)
        found["parameters"] = sum(prod(shape) for _, shape in source.tensors.values())
    corrupt = reader.corrupt_files() if deep else []
    return found | {"problems": [f"{path / name} is corrupt: a tensor's checksum differs" for name in corrupt]}


def _hf(path: Path, deep: bool) -> dict[str, Any]:
    return _attempt(lambda: _whole_hf(path))


def _whole_hf(path: Path) -> dict[str, Any]:
    spec, role, tensors = hf_source(path, None)
    return {
        "role": role,
        "dtypes": _names({tensor.dtype for tensor in tensors.values()}),
        "parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "files": len({tensor.file.path for tensor in tensors.values()}),
        **_model(spec),
    }


def _names(dtypes: Iterable[Any]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _model(spec: ModelSpec) -> dict[str, Any]:
    """The model's shape."""
    shape = {"layers": spec.num_layers, "hidden": spec.hidden_size, "vocabulary": spec.vocab_size}
    return {"family": spec.family, **shape, **({"experts": spec.num_experts} if spec.num_experts else {})}


def render(found: dict[str, Any], indent: str = "") -> str:
    """For people: a line a fact."""
    lines = []
    for key, value in found.items():
        if key == "problems":
            lines.append(f"{indent}{'NOT WHOLE' if value else 'whole'}")
        elif isinstance(value, dict) and "kind" in value:
            lines += [f"{indent}{key}", render(value, indent + "  ")]
        elif isinstance(value, dict):
            lines.append(f"{indent}{key}: {', '.join(f'{name} {part}' for name, part in value.items())}")
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: {', '.join(map(str, value))}")
        elif key == "bytes":
            lines.append(f"{indent}bytes: {value:,} ({value / 2**30:.2f} GiB)")
        else:
            lines.append(f"{indent}{key}: {f'{value:,}' if key == 'parameters' else value}")
    return "\n".join(lines)
