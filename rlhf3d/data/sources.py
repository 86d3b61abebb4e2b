"""Rows of a data set as its authors publish it: jsonl, json, parquet or arrow files, or the hub.

Invariant: rows come in an order fixed by the files' names, one at a time and with the values that
the file holds, and what was read is named by its digest. That is why files are read by Python's
json and pyarrow: `datasets` makes timestamps of texts that look like dates and floats of large
integers, refuses maps, and cannot name the line of a fault.
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

from rlhf3d.data.parquet import one_line, records_of
from rlhf3d.paths import refuse_pointer

HUB = "hub"
"""The source to download from with `datasets`; also hub:OWNER/NAME or hub:OWNER/NAME:CONFIG."""
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
_NO_ROWS = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
"""What `datasets.save_to_disk` writes besides the rows."""
_NAMED_FILES = 20
"""Files up to which each is named with its own digest."""
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
    files = _split_files(name, Path(source), splits, split)
    return [
        SourceSplit(part, _rows_of_files(paths), {"source": _digests(paths)})
        for part, paths in files.items()
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
            f"{name}: the source {source!r} needs the `datasets` package: pip install datasets, or "
            "give a folder"
        ) from error
    opened = []
    try:
        for split in splits:
            loaded = datasets.load_dataset(*hub, split=split, revision=revision)
            origin = {
                "source": ":".join(hub),
                "revision": revision,
                "version": str(loaded.version),
                "fingerprint": loaded._fingerprint,
            }
            opened.append(SourceSplit(split, loaded, origin))
    except Exception as error:  # the network, the hub and the data set each fail in their own ways
        raise ValueError(
            f"{name}: the hub did not give {':'.join(hub)} ({type(error).__name__}: {error})"
        ) from error
    return opened


def _split_files(
    name: str, source: Path, splits: Sequence[str], split: str | None
) -> dict[str, list[Path]]:
    """The files of each split that has some."""
    first = splits[0]
    if source.is_file():
        return {split or _split_of_file(source, splits): [source]}
    if not source.is_dir():
        raise ValueError(f"{name}: no such source: {source}; give a folder, a file or {HUB!r}")
    # Sorted: file systems list in any order, and the rows' order is part of the output.
    paths = sorted(path for path in source.rglob("*") if _has_rows(path))
    files: dict[str, list[Path]] = {part: [] for part in splits}
    for path in paths:
        part = split or _split_of(path.relative_to(source), splits)
        if part is not None:
            files.setdefault(part, []).append(path)
    if len(splits) == 1 and not files[first]:  # then the names do not matter
        files[first] = paths
    if not files[first]:
        names = ", ".join(sorted(path.name for path in source.iterdir())[:10])
        wanted = " or ".join(f"{first}*{suffix}" for suffix in SUFFIXES)
        raise ValueError(
            f"{name}: no {wanted} in {source} (has: {names or 'nothing'}); name one file, with "
            "--split"
        )
    return {part: paths for part, paths in files.items() if paths}


def _has_rows(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.name not in _NO_ROWS and path.is_file()


def _split_of_file(path: Path, splits: Sequence[str]) -> str:
    """The split of a lone file: the only one, the one that it is named after, or the first."""
    if len(splits) == 1:
        return splits[0]
    return _split_of(Path(path.name), splits) or splits[0]


def _split_of(path: Path, splits: Sequence[str]) -> str | None:
    """The split that a relative path names by a folder or by the start of the file's name."""
    for split in splits:
        for word in SPLIT_NAMES.get(split, (split,)):
            if path.name.startswith(word) or word in path.parts[:-1]:
                return split
    return None


def _rows_of_files(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        yield from read_rows(path)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file, streamed (except for a .json that is one document)."""
    refuse_pointer(path)
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".arrow":
        yield from _read_arrow(path)
    elif path.suffix == ".json" and (document := _read_document(path)) is not None:
        for number, row in enumerate(document, start=1):
            yield _object(row, f"{path}: entry {number}")
    else:
        yield from _read_lines(path)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path, memory_map=True)
        for _, record in records_of(file.iter_batches(_BATCH, use_threads=False), path):
            yield record
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a parquet file that can be read ({one_line(error)})"
        ) from error


def _read_arrow(path: Path) -> Iterator[Row]:
    try:
        with pa.memory_map(str(path)) as mapped:
            for _, record in records_of(_arrow_batches(mapped), path):
                yield record
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not an arrow file that can be read ({one_line(error)})"
        ) from error


def _arrow_batches(mapped: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Of either of Arrow's two formats: `datasets` writes streams, most others files."""
    try:
        stream = pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(mapped)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from stream


def _read_document(path: Path) -> list[Any] | None:
    """The rows of a .json that is one document; null where it has one object a line.

    A document is an array, an object with an array `data`, or one row.
    """
    text = _text(path.read_bytes(), str(path))
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        document = _json(text)
    except json.JSONDecodeError as error:
        # json's message for a second value behind the first: one object a line.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return None
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
    """UTF-8, with or without a byte order mark; ValueError, with `where`, for the rest."""
    try:
        # Some editors begin a file with a byte order mark, which JSON does not allow.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} is not UTF-8 ({error.reason}); convert the file, as with "
            "iconv -f latin1 -t utf-8"
        ) from error


def _json(text: str) -> Any:
    """A JSON value; ValueError for a key twice in an object, and for text that is not Unicode."""
    # By default the last of two equal keys wins without a word.
    value = json.loads(text, object_pairs_hook=_unique_keys)
    if "\\u" in text:  # only an escape can make half a surrogate pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half a character: {error.object[error.start]!r} without its other half"
            ) from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} is in an object twice")
        value[key] = item
    return value


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be one JSON object, not a {type(row).__name__}")
    return row


def file_sha256(path: Path) -> str:
    """Digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Sequence[Path]) -> dict[str, Any]:
    """Digest of each file by its name; one over all where they are many, or names repeat."""
    digests = [file_sha256(path) for path in paths]
    names = {path.name for path in paths}
    if len(paths) <= _NAMED_FILES and len(names) == len(paths):
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {f"{len(paths)} files": together}
