"""Rows of a data set as its authors publish it: files (jsonl, json, parquet, arrow), folders of them, or the hub.

Invariant: rows come in an order fixed by the files' names, one at a time, and what was read is named by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf3d.data.rows import one_line, record_of
from rlhf3d.paths import refuse_pointer

HUB = "hub"
"""The source that means: download with the `datasets` package; also hub:OWNER/NAME or hub:OWNER/NAME:CONFIG."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
_NOT_ROWS = {
    "dataset_info.json",
    "dataset_dict.json",
    "dataset_infos.json",
    "state.json",
}  # of datasets.save_to_disk
_MANY_FILES = 20
_BATCH = 1024

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SourceSplit:
    """One split of a source, not read yet."""

    name: str
    rows: Iterable[Row]
    origin: dict[str, Any]
    """What the rows come from, for the provenance."""


def open_source(
    name: str,
    source: str,
    hub: tuple[str, str] | None,
    splits: Sequence[str],
    split: str | None,
    revision: str | None,
) -> list[SourceSplit]:
    """The splits of data set `name` that `source` has; ValueError with the fix where there is none.

    `split` says which one a file holds, where its name does not; `revision` is the hub's.
    """
    if source == HUB or source.startswith(f"{HUB}:"):
        return _open_hub(name, source, hub, splits, revision)
    if revision is not None:
        raise ValueError(
            f"{name}: --revision {revision} is for the source {HUB!r}, not for {source}"
        )
    return [
        SourceSplit(found, _chain(paths), {"source": _digests(paths)})
        for found, paths in _split_files(name, Path(source), splits, split).items()
    ]


def _open_hub(
    name: str, source: str, hub: tuple[str, str] | None, splits: Sequence[str], revision: str | None
) -> list[SourceSplit]:
    if source != HUB:
        repository, _, config = source.removeprefix(f"{HUB}:").partition(":")
        hub = (repository, config or "default")
    if hub is None:
        raise ValueError(
            f"{name} does not say where it is on the hub: give {HUB}:OWNER/NAME, a folder or a file"
        )
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name}: the source {source!r} needs the `datasets` package: pip install datasets, or give a folder"
        ) from error
    found = []
    try:
        for split in splits:
            loaded = datasets.load_dataset(*hub, split=split, revision=revision)
            version = {
                "revision": revision,
                "version": str(loaded.version),
                "fingerprint": loaded._fingerprint,
            }
            found.append(SourceSplit(split, loaded, {"source": ":".join(hub), **version}))
    except Exception as error:  # the network, the hub and the data set each fail in their own ways
        raise ValueError(
            f"{name}: the hub did not give {':'.join(hub)} ({type(error).__name__}: {error})"
        ) from error
    return found


def _split_files(
    name: str, source: Path, splits: Sequence[str], split: str | None
) -> dict[str, list[Path]]:
    """Files of each split; a lone file is the only split of the set, or train unless its name says otherwise."""
    if source.is_file():
        if split is None:
            split = (
                splits[0]
                if len(splits) == 1
                else (_split_of(Path(source.name), splits) or splits[0])
            )
        return {split: [source]}
    if not source.is_dir():
        raise ValueError(f"{name}: no such source: {source}; give a folder, a file or {HUB!r}")
    files = sorted(
        p
        for p in source.rglob("*")
        if p.suffix in SUFFIXES and p.name not in _NOT_ROWS and p.is_file()
    )
    found: dict[str, list[Path]] = {s: [] for s in splits}
    for path in files:
        if of := split or _split_of(path.relative_to(source), splits):
            found.setdefault(of, []).append(path)
    if len(splits) == 1 and not found[splits[0]]:
        found[splits[0]] = files
    if not found[splits[0]]:
        names = ", ".join(sorted(p.name for p in source.iterdir())[:10])
        wanted = " or ".join(f"{splits[0]}*{suffix}" for suffix in SUFFIXES)
        raise ValueError(
            f"{name}: no {wanted} in {source} (has: {names or 'nothing'}); name one file, with --split"
        )
    return {of: paths for of, paths in found.items() if paths}


def _split_of(path: Path, splits: Sequence[str]) -> str | None:
    """The split that a relative path names by a folder or by the start of the file's name."""
    for split in splits:
        for word in SPLIT_NAMES.get(split, (split,)):
            if path.name.startswith(word) or word in path.parts[:-1]:
                return split
    return None


def _chain(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from read_rows(path)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file, streamed (but for a .json that is one array)."""
    refuse_pointer(path)
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".arrow":
        yield from _read_arrow(path)
    elif path.suffix == ".json" and (document := _whole_json(path)) is not None:
        for number, row in enumerate(document, start=1):
            yield _object(row, f"{path}: entry {number}")
    else:
        yield from _read_lines(path)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        yield from _records(
            pq.ParquetFile(path, memory_map=True).iter_batches(_BATCH, use_threads=False), path
        )
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a parquet file that can be read ({one_line(error)})"
        ) from error


def _read_arrow(path: Path) -> Iterator[Row]:
    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                batches = iter(pa.ipc.open_stream(mapped))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(mapped)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _records(batches, path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not an arrow file that can be read ({one_line(error)})"
        ) from error


def _records(batches: Iterable[Any], path: Path) -> Iterator[Row]:
    first = 0
    for batch in batches:
        for offset in range(batch.num_rows):
            yield record_of(batch, offset, f"{path}: row {first + offset}")
        first += batch.num_rows


def _whole_json(path: Path) -> list[Any] | None:
    """The rows of a .json that is one document: an array, an object with one array `data`, or one row."""
    text = _text(path.read_bytes(), str(path))
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        document = _json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return None  # one object a line
        raise ValueError(f"{path}: not JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read ({error})") from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    return document if isinstance(document, list) else [document]


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _text(line, where)
            if not text.strip():
                continue
            try:
                row = _json(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: not JSON ({error}); each line must be one object"
                ) from error
            yield _object(row, where)


def _text(data: bytes, where: str) -> str:
    """UTF-8 with or without a mark at its start; ValueError, starting with `where`, for other encodings."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} is not UTF-8 ({error.reason}); convert the file, as with "
            "iconv -f latin1 -t utf-8"
        ) from error


def _json(text: str) -> Any:
    """A JSON value; ValueError for a key that stands in an object twice, and for text that UTF-8 cannot hold."""
    value = json.loads(text, object_pairs_hook=_once)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half a character: {error.object[error.start]!r} without its other half"
            ) from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(
            key for position, (key, _) in enumerate(pairs) if key in dict(pairs[:position])
        )
        raise ValueError(f"the key {twice!r} stands in an object twice")
    return found


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be one JSON object, not a {type(row).__name__}")
    return row


def file_sha256(path: Path) -> str:
    """Digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Sequence[Path]) -> dict[str, Any]:
    """Digest of each file by its name; of many, one digest over all."""
    if len(paths) <= _MANY_FILES and len({path.name for path in paths}) == len(paths):
        return {path.name: file_sha256(path) for path in paths}
    digest = hashlib.sha256("".join(file_sha256(path) for path in paths).encode())
    return {f"{len(paths)} files": digest.hexdigest()}
