"""What a run, checkpoint, Megatron folder or Hugging Face folder holds, and whether it is complete.

Invariant: only reads. Every file that is missing, cut off or (with `deep`) changed is named in
`problems`, and what was not looked at in `not_compared`: a folder without either is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import yaml

from rlhf3d.checkpoints.convert import HFSource, MegatronSource, open_hf
from rlhf3d.checkpoints.locate import ROLES, kind_of, megatron_folder, reference_folder
from rlhf3d.checkpoints.manifest import MANIFEST, problems, read_manifest
from rlhf3d.checkpoints.store import EXPERIENCE_FOLDER, QUEUE_FILE, Store
from rlhf3d.checkpoints.torch_dist import TorchDistReader
from rlhf3d.models.boxes import row_boxes
from rlhf3d.models.hf_io import BLOCK_BYTES
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.observability.tables import View
from rlhf3d.units import GIB


def inspect(path: Path, deep: bool = False) -> dict[str, Any]:
    """What `path` holds, as JSON; it is complete where `problems` and `not_compared` are empty.

    ValueError where it is nothing known.
    """
    kind = kind_of(path)
    look = {"hf": _hf, "megatron": _megatron, "checkpoint": _checkpoint, "run": _run}[kind]
    try:
        contents = look(path, deep)
    except ValueError as error:
        contents = {"problems": [str(error)]}
    found = {"path": str(path), "kind": kind, **contents}
    skipped = [] if deep else ["contents of files (--deep reads them)"]
    last = {
        "not_compared": skipped + found.pop("not_compared", []),
        "problems": found.pop("problems", []),
    }
    return {**found, **last}


def _run(path: Path, deep: bool) -> dict[str, Any]:
    store = Store(path / "checkpoints")
    complete = [store.path(step) for step in store.steps()]
    found = {
        "steps": store.steps(),
        "unfinished": sorted(
            p.name for p in store.folder.iterdir() if p.is_dir() and not (p / MANIFEST).is_file()
        ),
    }
    if not complete:
        return {**found, "problems": [f"{store.folder} has no complete checkpoint"]}
    latest = inspect(complete[-1], deep)
    return {**found, "latest": latest, "not_compared": _own(latest), "problems": latest["problems"]}


def _checkpoint(path: Path, deep: bool) -> dict[str, Any]:
    manifest = read_manifest(path)
    damaged = problems(path, manifest, contents=deep)
    found = asdict(manifest) | {
        "files": len(manifest.files),
        "bytes": sum(f.bytes for f in manifest.files.values()),
    }
    found["layout"] = _layouts(path)
    found |= _ahead(path)
    for part in (*ROLES, "hf"):
        if (path / part).is_dir() and (part in ROLES or any((path / part).glob("*.safetensors"))):
            found[part] = inspect(path / part)  # the manifest's checksums cover its files
    parts = [found[part] for part in (*ROLES, "hf") if part in found]
    found["not_compared"] = list(chain.from_iterable(map(_own, parts)))
    # What the manifest finds damaged is not reported a second time.
    found["problems"] = damaged or list(chain.from_iterable(part["problems"] for part in parts))
    return found


def _own(found: dict[str, Any]) -> list[str]:
    """What was not compared of a part, except contents: the folder around it reports those."""
    return [text for text in found["not_compared"] if not text.startswith("contents of files")]


def _layouts(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Each role's layout in the run's configuration, without what is off; empty if unknown."""
    config_file = checkpoint / "config.yaml"
    if not config_file.is_file():
        return {}
    config = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
    sizes = ("tp", "pp", "dp", "cp", "vpp", "ep", "first_stage_layers", "last_stage_layers")
    layouts: dict[str, dict[str, Any]] = {}
    for role in ROLES:
        layout = (config.get(role) or {}).get("layout")
        if layout:
            given = {name: layout[name] for name in sizes if layout.get(name) is not None}
            layouts[role] = given
    return layouts


def _ahead(checkpoint: Path) -> dict[str, dict[str, int]]:
    """How much experience is ahead of the training, where there is some."""
    file = checkpoint / EXPERIENCE_FOLDER / QUEUE_FILE
    if not file.is_file():
        return {}
    try:
        return {"ahead": json.loads(file.read_text(encoding="ascii"))["counts"]}
    except (KeyError, TypeError, ValueError):
        return {}  # damaged, which its checksum shows


def _megatron(path: Path, deep: bool) -> dict[str, Any]:
    path = megatron_folder(path, None)
    reader = TorchDistReader(path)
    weights = {key: reader.tensors[key] for key in reader.weight_keys()}
    has_value_head = any(key.endswith("value_head.weight") for key in weights)
    # A set of chunks by place: the count says into how many blocks the weights are cut.
    chunks = set(chain.from_iterable(tensor.chunks for tensor in weights.values()))
    found: dict[str, Any] = {
        "role": "critic" if has_value_head else "actor",
        "dtypes": _names({tensor.dtype for tensor in weights.values()}),
        "parameters": sum(prod(tensor.shape) for tensor in weights.values()),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        # All tensors that are not the model's are the optimizer's.
        "optimizer": len(weights) < len(reader.tensors),
        "chunks": len(chunks),
    }
    try:
        # Without a config.json there is no model to compare with; that is reported, not an error.
        reference = reference_folder(path, None)
    except ValueError:
        reference = None
    if reference is None:
        found["not_compared"] = [
            f"tensors of {path} with those of a model (there is no config.json beside it)"
        ]
    else:
        source = MegatronSource(path, load_spec(reference, with_weights=False))
        found |= _model(source.spec)
        found["parameters"] = sum(prod(shape) for shape in source.shapes.values())
        found |= {"notes": list(source.notes)} if source.notes else {}
    corrupt = reader.corrupt_files() if deep else []
    return found | {
        "problems": [f"{path / name} is corrupt: a tensor's checksum differs" for name in corrupt]
    }


def _hf(path: Path, deep: bool) -> dict[str, Any]:
    hf = open_hf(path, None)
    reader = hf.reader
    found = {
        "role": hf.role,
        "dtypes": _names({reader.dtype(name) for name in hf.names}),
        "parameters": sum(prod(reader.shape(name)) for name in hf.names),
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "files": len({reader.file(name) for name in hf.names}),
        **_model(hf.spec),
        "problems": _not_finite(hf) if deep else [],
    }
    if reader.notes:
        found["notes"] = list(reader.notes)
    return found


def _not_finite(hf: HFSource) -> list[str]:
    """Every tensor with values that are NaN or infinite."""
    found = []
    for name in hf.names:
        count, dtype = 0, hf.reader.dtype(name)
        # Blocks of rows: an embedding need not fit into memory.
        for box in row_boxes(hf.reader.shape(name), dtype.itemsize, BLOCK_BYTES):
            count += int((~hf.reader.read(name, box).isfinite()).sum())
        if count:
            found.append(
                f"{hf.reader.file(name)}: {name} has {count} values that are NaN or infinite"
            )
    return found


def _names(dtypes: Iterable[Any]) -> list[str]:
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _model(spec: ModelSpec) -> dict[str, Any]:
    """The model's shape."""
    shape = {"layers": spec.num_layers, "hidden": spec.hidden_size, "vocabulary": spec.vocab_size}
    return {
        "family": spec.family,
        **shape,
        **({"experts": spec.num_experts} if spec.num_experts else {}),
    }


def _short(value: Any) -> str:
    return (
        "×".join(f"{name}{size}" for name, size in value.items())
        if isinstance(value, dict)
        else str(value)
    )


def _verdict(problems: list[str], not_compared: list[str]) -> str:
    if problems:
        return "NOT COMPLETE"
    return (
        f"nothing is missing; not compared: {'; '.join(not_compared)}"
        if not_compared
        else "complete"
    )


def inspection_view(found: dict[str, Any]) -> View:
    """Return what `inspect` found, a line per fact."""
    return View(_lines(found), found)


def _lines(found: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in found.items():
        if key == "problems":
            lines.append(indent + _verdict(value, found["not_compared"]))
        elif isinstance(value, dict) and "kind" in value:
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        elif key != "not_compared":
            lines.append(f"{indent}{key}: {_fact(key, value)}")
    return lines


def _fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key == "bytes":
        return f"{value:,} ({value / GIB:.2f} GiB)"
    return f"{value:,}" if key == "parameters" else str(value)
