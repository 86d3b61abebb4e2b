"""`rlhf3d data prepare NAME`: from a data set as its authors publish it to train.parquet and test.parquet.

Invariant: the same source and options give the same bytes, and every example that did not become a row
is counted.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf3d.data import arithmetic, gsm8k
from rlhf3d.data.rows import PromptRow, write_parquet

_Source = tuple[str, Iterable[Mapping[str, Any]], dict[str, Any]]
HUB = "hub"
"""The source that means: download with the `datasets` package."""


@dataclass(frozen=True)
class Split:
    """Rows of one split before they are written."""

    name: str
    rows: list[PromptRow]
    dropped: int
    origin: dict[str, Any]


@dataclass(frozen=True)
class PreparedFile:
    """One file written."""

    split: str
    path: str
    rows: int
    dropped: int
    """Examples of the source that did not become rows."""
    sha256: str


def prepare(name: str, source: str | Path | None, output: str | Path, **options: Any) -> list[PreparedFile]:
    """Write the splits of data set `name` to `output`/{train,test}.parquet and say what was written.

    `source` is a folder or file of the data set (jsonl or parquet), "hub" to download it, or null where
    the data are generated. `options` are the preparer's keyword arguments. Raises ValueError, naming the
    fix, for an unknown name or option, and for a source that is missing, unreadable or without usable rows.
    """
    preparer = PREPARERS.get(name)
    if preparer is None:
        raise ValueError(f"no data set {name!r}; known are {', '.join(PREPARERS)}")
    known = [p for p in inspect.signature(preparer).parameters if p != "source"]
    for option in options:
        if option not in known:
            raise ValueError(f"data set {name} has no option {option!r}; it has {', '.join(known)}")
    splits = preparer(source, **options)
    for split in splits:
        if not split.rows:
            raise ValueError(f"{name}: no usable row in the {split.name} split ({split.dropped} dropped)")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(name, split, options, folder / f"{split.name}.parquet") for split in splits]


def _write(name: str, split: Split, options: Mapping[str, Any], path: Path) -> PreparedFile:
    provenance = {"name": name, "split": split.name, "dropped": split.dropped, "options": dict(options)}
    write_parquet(split.rows, path, {**provenance, **split.origin})
    return PreparedFile(split.name, str(path), len(split.rows), split.dropped, _sha256(path))


def _arithmetic(
    source: str | Path | None,
    *,
    train_size: int = 2048,
    test_size: int = 256,
    seed: int = 0,
    difficulty: str = "easy",
    templates: Sequence[str] | None = None,
    suffix: str = "",
) -> list[Split]:
    if source is not None:
        raise ValueError(f"arithmetic is generated and takes no source (got {source}); leave it out")
    train, test = arithmetic.generate(train_size, test_size, seed, difficulty, templates, suffix)
    origin = {"source": "generated"}
    return [Split("train", train, 0, origin), *([Split("test", test, 0, origin)] if test else [])]


def _gsm8k(source: str | Path | None, *, suffix: str = gsm8k.SUFFIX) -> list[Split]:
    return [
        _map_split(split, examples, origin, gsm8k.make_map_fn(split, suffix))
        for split, examples, origin in _examples("gsm8k", source, gsm8k.DATA_SOURCE, "main")
    ]


PREPARERS: dict[str, Callable[..., list[Split]]] = {"arithmetic": _arithmetic, "gsm8k": _gsm8k}


def _map_split(
    split: str,
    examples: Iterable[Mapping[str, Any]],
    origin: dict[str, Any],
    to_row: Callable[[Mapping[str, Any], int], PromptRow],
) -> Split:
    rows, dropped = [], 0
    for index, example in enumerate(examples):
        try:
            rows.append(to_row(example, index))
        except ValueError:
            dropped += 1
    return Split(split, rows, dropped, origin)


def _examples(name: str, source: str | Path | None, hub_name: str, hub_config: str) -> list[_Source]:
    """(split, examples, origin) of each split found in the source."""
    if source is None:
        raise ValueError(
            f"{name} needs a source: a folder with train and test files (jsonl or parquet) from "
            f"https://huggingface.co/datasets/{hub_name}, or {HUB!r} to download it"
        )
    if str(source) == HUB:
        return _from_hub(name, hub_name, hub_config)
    found: list[_Source] = []
    for split, paths in _split_files(name, Path(source)).items():
        origin = {"source": {path.name: _sha256(path) for path in paths}}
        found.append((split, [example for path in paths for example in _read_examples(path)], origin))
    return found


def _from_hub(name: str, hub_name: str, hub_config: str) -> list[_Source]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name}: the source {HUB!r} needs the `datasets` package: pip install datasets, or give a folder"
        ) from error
    loaded = datasets.load_dataset(hub_name, hub_config)
    origin = {"source": f"{hub_name}:{hub_config}"}
    return [(split, loaded[split], origin) for split in ("train", "test") if split in loaded]


def _split_files(name: str, source: Path) -> dict[str, list[Path]]:
    """Files whose names start with train or test, by split; a lone file is train unless named test."""
    if source.is_file():
        return {"test" if source.stem.startswith("test") else "train": [source]}
    if not source.is_dir():
        raise ValueError(f"{name}: no such source: {source}; give a folder, a file or {HUB!r}")
    files = sorted(p for p in source.iterdir() if p.suffix in (".jsonl", ".parquet"))
    splits = {split: [p for p in files if p.stem.startswith(split)] for split in ("train", "test")}
    if not splits["train"]:
        names = ", ".join(sorted(p.name for p in source.iterdir())[:10])
        raise ValueError(f"{name}: no train*.jsonl or train*.parquet in {source} (has: {names or 'nothing'})")
    return {split: paths for split, paths in splits.items() if paths}


def _read_examples(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        try:
            return list(pq.read_table(path, use_threads=False).to_pylist())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from error
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); each line must be one object") from error
        if not isinstance(example, dict):
            raise ValueError(f"{path}:{number}: each line must be one JSON object, not a {type(example).__name__}")
        examples.append(example)
    return examples


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
