"""Rows of any number of parquet files by their number, without holding them in memory.

Invariant: a row costs one slice of memory-mapped Arrow, wherever it lies; what is resident does not grow with them.
Parquet is compressed, so a large file is unpacked once into an Arrow file in the cache folder (written beside, then
renamed) and mapped from there by every later run; a small one is kept unpacked in memory.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlhf3d.data.rows import (
    PromptRow,
    open_parquet,
    prompt_columns,
    read_batches,
    record_of,
    row_of,
)

IN_MEMORY_BYTES = 64 * 2**20
"""Unpacked size up to which a file is kept in memory."""
BATCH_ROWS = 4096
_FORMAT = "2"


class RowStore:
    """The rows of `files`, numbered through; `cache_dir` is where large files are unpacked (null: the user's cache)."""

    def __init__(self, files: Sequence[str | Path], cache_dir: str | Path | None = None) -> None:
        folder = Path(cache_dir) if cache_dir is not None else default_cache()
        self._files = [str(file) for file in files]
        self._batches = [_open(Path(file), folder) for file in files]
        self._starts = [0, *accumulate(len(batches) for batches in self._batches)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> PromptRow:
        """The row; ValueError, naming file and row, where it cannot be used."""
        file = self.file_of(number)
        where = self.where(number)
        return row_of(self._batches[file].row(number - self._starts[file], where), where)

    def iter_range(self, start: int, stop: int) -> Iterator[PromptRow]:
        """Rows from `start` to before `stop`."""
        return (self[number] for number in range(start, stop))

    def file_of(self, number: int) -> int:
        """Which file a row is in."""
        return bisect.bisect_right(self._starts, number) - 1

    def where(self, number: int) -> str:
        """File and row, for people."""
        file = self.file_of(number)
        return f"{self._files[file]} row {number - self._starts[file]}"

    @property
    def file_ranges(self) -> list[range]:
        """The numbers of each file's rows."""
        return [
            range(start, stop) for start, stop in zip(self._starts, self._starts[1:], strict=False)
        ]

    def data_sources(self) -> list[str]:
        """The distinct data sources, sorted; reads that column alone."""
        found: set[Any] = set()
        for batches in self._batches:
            for batch in batches:
                found |= _sources_of(batch)
        return sorted(str(source) for source in found)


def data_sources(files: Sequence[str | Path]) -> set[Any]:
    """The distinct data sources of some files, streamed."""
    found: set[Any] = set()
    for path in files:
        for batch in read_batches(open_parquet(path), path, BATCH_ROWS):
            found |= _sources_of(batch)
    return found


def _sources_of(batch: Any) -> set[Any]:
    """The distinct data sources of a batch; those that are not UTF-8 are reported when their rows are read."""
    try:
        return set(pc.unique(batch.column("data_source")).to_pylist())
    except UnicodeDecodeError:
        return set()


class _Batches:
    """Record batches of `BATCH_ROWS` rows each, the last one perhaps shorter."""

    def __init__(self, reader: Any, rows: int) -> None:
        self._reader, self._rows = reader, rows

    def __len__(self) -> int:
        return self._rows

    def row(self, number: int, where: str) -> dict[str, Any]:
        batch, offset = divmod(number, BATCH_ROWS)
        return record_of(self._reader.get_batch(batch), offset, where)

    def __iter__(self) -> Iterator[Any]:
        return (self._reader.get_batch(i) for i in range(-(-self._rows // BATCH_ROWS)))


def default_cache() -> Path:
    """Where large files are unpacked unless the configuration says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf3d" / "prompts"


def _open(path: Path, cache: Path) -> _Batches:
    file = open_parquet(path)
    rows = file.metadata.num_rows
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    if size <= IN_MEMORY_BYTES:
        sink = pa.BufferOutputStream()
        _unpack(file, path, sink)
        return _Batches(pa.ipc.open_file(sink.getvalue()), rows)
    unpacked = cache / f"{_identity(path)}.arrow"
    if not unpacked.is_file():
        _unpack_to(file, path, unpacked)
    return _Batches(pa.ipc.open_file(pa.memory_map(str(unpacked))), rows)


def _identity(path: Path) -> str:
    status = path.stat()
    key = f"{_FORMAT}:{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _unpack_to(file: pq.ParquetFile, path: Path, unpacked: Path) -> None:
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    partial = unpacked.with_name(f".{unpacked.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(partial), "wb") as sink:
            _unpack(file, path, sink)
        os.replace(partial, unpacked)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: cannot unpack a data set to {unpacked.parent} ({error}); free space there or name another"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _unpack(file: pq.ParquetFile, path: Path, sink: Any) -> None:
    """Write the prompt columns as Arrow, in batches of exactly `BATCH_ROWS` rows."""
    columns = prompt_columns(file.schema_arrow)
    schema = pa.schema([_plain(file.schema_arrow.field(name)) for name in columns])
    with pa.ipc.new_file(sink, schema) as writer:
        left: list[Any] = []
        rows = 0
        for batch in read_batches(file, path, BATCH_ROWS):
            left.append(pa.Table.from_batches([batch]).select(columns).cast(schema))
            rows += batch.num_rows
            if rows >= BATCH_ROWS:
                table = pa.concat_tables(left).combine_chunks()
                whole = rows - rows % BATCH_ROWS
                for part in table.slice(0, whole).to_batches(max_chunksize=BATCH_ROWS):
                    writer.write_batch(part)
                left, rows = [table.slice(whole)], rows - whole
        if rows:
            (last,) = pa.concat_tables(left).combine_chunks().to_batches(max_chunksize=BATCH_ROWS)
            writer.write_batch(last)


def _plain(field: Any) -> Any:
    """A dictionary-encoded column as what it encodes: Arrow files cannot change a dictionary half-way."""
    kind = field.type
    return pa.field(field.name, kind.value_type if pa.types.is_dictionary(kind) else kind)
