"""Rows of any number of parquet files by their number, without holding them in memory.

Invariant: a row costs one slice of memory-mapped Arrow, wherever it lies; what is resident does not
grow with the files. Parquet is compressed, so a large file is unpacked once into an Arrow file in
the cache folder (written there under another name, then renamed, so that jobs may share the folder)
and mapped from there by every later run; a small one is unpacked in memory.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf3d.data.parquet import (
    open_parquet,
    other_columns,
    prompt_columns,
    read_batches,
    record_of,
)
from rlhf3d.data.rows import PromptRow, environment_row, row_of

IN_MEMORY_BYTES = 64 * 2**20
"""Unpacked size up to which a file is held in memory."""
BATCH_ROWS = 4096
"""Rows that are unpacked at a time."""
_FORMAT = "2"
"""Part of an unpacked file's name: a new one for a new layout of columns."""


class RowStore:
    """The rows of `files`, numbered through.

    Large files are unpacked in `cache_dir` (null: the user's cache). `environments`: rows have the
    files' other columns too, and `prompt` is the only one that these must have.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        cache_dir: str | Path | None = None,
        environments: bool = False,
    ) -> None:
        cache = default_cache() if cache_dir is None else Path(cache_dir)
        self.files = [str(file) for file in files]
        self._environments = environments
        self._batches: list[pa.RecordBatch] = []
        self._file_starts = [0]
        for file in files:
            batches = _open(Path(file), cache, environments)
            self._batches += batches
            rows = sum(batch.num_rows for batch in batches)
            self._file_starts.append(self._file_starts[-1] + rows)
        # Batches, not one table: at each access a table searches all its chunks again.
        self._batch_starts = [0, *accumulate(batch.num_rows for batch in self._batches)]

    def __len__(self) -> int:
        return self._file_starts[-1]

    def __getitem__(self, number: int) -> PromptRow:
        """The row; ValueError, naming file and row, where it cannot be used."""
        batch, offset = _place(self._batch_starts, number)
        where = self.where(number)
        record = record_of(self._batches[batch], offset, where)
        if not self._environments:
            return row_of(record, where)
        return environment_row(record, where)

    def where(self, number: int) -> str:
        """File and row, for people."""
        file, offset = _place(self._file_starts, number)
        return f"{self.files[file]} row {offset}"

    @property
    def file_ranges(self) -> list[range]:
        """The numbers of each file's rows."""
        return [range(start, stop) for start, stop in pairwise(self._file_starts)]


def _place(starts: Sequence[int], number: int) -> tuple[int, int]:
    """Which part a row is in, of parts that begin at `starts`, and its number there."""
    part = bisect.bisect_right(starts, number) - 1
    return part, number - starts[part]


def default_cache() -> Path:
    """Where large files are unpacked unless the configuration names another folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rlhf3d" / "prompts"


def _open(path: Path, cache: Path, environments: bool) -> list[pa.RecordBatch]:
    file = open_parquet(path, environments)
    columns = prompt_columns(file.schema_arrow)
    if environments:
        columns += other_columns(file.schema_arrow, path)
    metadata = file.metadata
    # Parquet's total_byte_size is that before compression.
    unpacked_bytes = sum(
        metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)
    )
    if unpacked_bytes <= IN_MEMORY_BYTES:
        return list(read_batches(file, path, BATCH_ROWS, columns))
    unpacked = cache / f"{_identity(path, environments)}.arrow"
    if not unpacked.is_file():
        _unpack_to(file, path, unpacked, columns)
    # The batches are views of the mapped file: a page is read when a row of it is.
    reader = pa.ipc.open_file(pa.memory_map(str(unpacked)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _identity(path: Path, environments: bool) -> str:
    status = path.stat()
    # A replaced file gets another name, and so is unpacked again; reading it all would be slow.
    key = f"{_FORMAT}:{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    if environments:
        key += ":all"
    return f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def _unpack_to(file: pq.ParquetFile, path: Path, unpacked: Path, columns: Sequence[str]) -> None:
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the rename is atomic; with the process's id, so that two jobs
    # that unpack the same file do not write to one.
    partial = unpacked.with_name(f".{unpacked.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(partial), "wb") as sink:
            _unpack(file, path, sink, columns)
        os.replace(partial, unpacked)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: cannot unpack a data set to {unpacked.parent} ({error}); "
            "free space there or name another"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _unpack(file: pq.ParquetFile, path: Path, sink: pa.NativeFile, columns: Sequence[str]) -> None:
    """Write columns as Arrow, a batch at a time."""
    schema = pa.schema([_plain(file.schema_arrow.field(name)) for name in columns])
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in read_batches(file, path, BATCH_ROWS, columns):
            writer.write_table(pa.Table.from_batches([batch]).select(columns).cast(schema))


def _plain(field: pa.Field) -> pa.Field:
    """A dictionary-encoded column as what it encodes: Arrow files have one dictionary a column."""
    kind = field.type
    return pa.field(field.name, kind.value_type if pa.types.is_dictionary(kind) else kind)
