"""Files of prompt rows: the one format that training, validation and preparation share.

Invariant: what is written reads back equal, the same rows give the same bytes, a file is either
complete or absent, and reading or writing holds one row group at a time. Files of verl's users load
unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf3d.data.messages import NOT_TEXT
from rlhf3d.data.rows import (
    NO_SOURCE,
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    PromptRow,
    row_of,
)
from rlhf3d.paths import refuse_pointer

ROW_GROUP_SIZE = 4096
_MESSAGE = pa.struct([pa.field("content", pa.string()), pa.field("role", pa.string())])
_PROVENANCE_KEY = b"rlhf3d.provenance"


def write_parquet(
    rows: Iterable[PromptRow],
    path: str | Path,
    provenance: Mapping[str, Any],
    row_group_size: int = ROW_GROUP_SIZE,
) -> int:
    """Write `rows` to `path` through a temporary file, and return how many there were.

    `provenance` is put into the file's metadata as JSON after the last row was taken, so it may be
    filled meanwhile. The first row group fixes the schema. ValueError where there are no rows, or
    where a later row has other keys, or other types under them.
    """
    path = Path(path)
    # Beside `path`, so that the rename at the end is atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows, count = iter(rows), 0
    try:
        with ExitStack() as stack:
            writer = None
            while group := list(islice(rows, row_group_size)):
                if writer is None:
                    # Only now: the keys of reward_model and extra_info are those of the first rows.
                    schema = _schema_of(group)
                    writer = stack.enter_context(pq.ParquetWriter(temporary, schema))
                _check_keys(group, schema, count, path)
                records = [_record(row) for row in group]
                writer.write_table(pa.Table.from_pylist(records, schema=schema))
                count += len(group)
            if writer is None:
                raise ValueError(f"{path}: no rows to write")
            origin = json.dumps(provenance, sort_keys=True).encode()
            # Parquet's metadata is at the end of a file, so it may be added after the rows.
            writer.add_key_value_metadata({_PROVENANCE_KEY: origin})
        os.replace(temporary, path)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: give each key of reward_model and extra_info one type: {error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _schema_of(rows: Sequence[PromptRow]) -> pa.Schema:
    """Arrow schema of `rows`.

    It is fixed except for messages with more than a role and a text, and for the keys of
    `reward_model` and `extra_info`, which are the data set's.
    """
    prompt = pa.list_(_MESSAGE)
    # With tool calls or names the fields are the data set's own, so they are read off its rows.
    if not all(_is_plain(row) for row in rows):
        prompt = pa.infer_type([row.prompt for row in rows])
    fields = [
        pa.field("data_source", pa.string()),
        pa.field("prompt", prompt),
        pa.field("ability", pa.string()),
        pa.field("reward_model", pa.infer_type([row.reward_model for row in rows])),
    ]
    if any(row.extra_info for row in rows):  # parquet has no struct without fields
        fields.append(pa.field("extra_info", pa.infer_type([row.extra_info for row in rows])))
    if any(row.tools for row in rows):
        fields.append(pa.field("tools", pa.string()))
    if any(row.environment for row in rows):
        fields.append(pa.field("environment", pa.string()))
    return pa.schema(fields)


def _is_plain(row: PromptRow) -> bool:
    return all(message.keys() == {"role", "content"} for message in row.prompt)


def _record(row: PromptRow) -> dict[str, Any]:
    """A row as it is written: tools as JSON text, as their schemas differ."""
    assert not row.others, "read for an environment, not to be written"
    return {**asdict(row), "tools": json.dumps(row.tools) if row.tools else None}


def _check_keys(rows: Sequence[PromptRow], schema: pa.Schema, first: int, path: Path) -> None:
    """ValueError for keys that the schema lacks: pyarrow would leave them out without a word."""
    columns = ("reward_model", "extra_info", "prompt")
    known = {column: _struct_keys(schema, column) for column in columns}
    first_rows = f"the first {ROW_GROUP_SIZE} rows lack"
    for number, row in enumerate(rows, start=first):
        structs = (
            ("reward_model", row.reward_model),
            ("extra_info", row.extra_info),
            *(("prompt", message) for message in row.prompt),
        )
        for column, struct in structs:
            extra = struct.keys() - known[column]
            if extra:
                raise ValueError(
                    f"{path}: row {number} has {column} {sorted(extra)}, which {first_rows}; "
                    "give every row the same keys"
                )
        for column in ("tools", "environment"):
            if getattr(row, column) and column not in schema.names:
                raise ValueError(f"{path}: row {number} has {column}, which {first_rows}")


def _struct_keys(schema: pa.Schema, column: str) -> set[str]:
    if column not in schema.names:
        return set()
    kind = schema.field(column).type
    if pa.types.is_list(kind):
        kind = kind.value_type
    return {field.name for field in kind}


def open_parquet(path: str | Path, environments: bool = False) -> pq.ParquetFile:
    """A file of prompts, memory-mapped.

    ValueError where it is missing, unreadable, or without a column or row that prompts need; for
    runs with `environments`, `prompt` alone is needed (see `rows.environment_row`).
    """
    if not Path(path).is_file():
        problem = "a folder; name the files in it" if Path(path).is_dir() else "no such file"
        raise ValueError(f"{path}: {problem}; `rlhf3d data prepare` writes prompt files")
    refuse_pointer(Path(path))
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a parquet file ({one_line(error)}); `rlhf3d data prepare` writes them"
        ) from error
    columns = file.schema_arrow.names
    for column in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS):
        _refuse_repeated(columns, column, path)
    for column in ("prompt",) if environments else REQUIRED_COLUMNS:
        if column not in columns:
            raise ValueError(
                f"{path}: no column {column!r} (it has: {', '.join(columns)}). Prompts need "
                f"{', '.join(REQUIRED_COLUMNS)}; `rlhf3d data prepare` writes such files (with "
                "environment.path, prompt is enough)"
            )
    kind = pa.string()
    if "data_source" in columns:
        kind = file.schema_arrow.field("data_source").type
    if not _is_text(kind):
        raise ValueError(
            f"{path}: column 'data_source' must be text, not {kind}; write its names as text"
        )
    if not file.metadata.num_rows:
        raise ValueError(f"{path}: the file has no rows; prepare it again or name another file")
    return file


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is some kind of text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)  # its rows are refused one by one, with their numbers
    )


def prompt_columns(schema: pa.Schema) -> list[str]:
    """Those columns of a file that make a `PromptRow`."""
    # NOT_TEXT is read too, in order to refuse rows that use it.
    known = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *NOT_TEXT)
    return [name for name in known if name in schema.names]


def other_columns(schema: pa.Schema, path: str | Path) -> list[str]:
    """The other columns of a file; ValueError for two of one name."""
    known = prompt_columns(schema)
    others = [name for name in schema.names if name not in known]
    for name in others:
        _refuse_repeated(schema.names, name, path)
    return others


def _refuse_repeated(columns: Sequence[str], name: str, path: str | Path) -> None:
    # A record is a dict by column name, so one of two would be lost.
    if columns.count(name) > 1:
        raise ValueError(
            f"{path}: column {name!r} occurs {columns.count(name)} times; keep one of them"
        )


def read_batches(
    file: pq.ParquetFile, path: str | Path, size: int, columns: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Batches of `columns` (default: those of prompts); ValueError where the file is damaged."""
    wanted = list(columns) or prompt_columns(file.schema_arrow)
    try:
        yield from file.iter_batches(size, columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read: {one_line(error)}; it is damaged, so copy or prepare it again"
        ) from error


def data_sources(files: Sequence[str | Path], environments: bool = False) -> set[str]:
    """The distinct data sources of prompt files; reads that column alone.

    `environments` as for `open_parquet`.
    """
    found: set[str | None] = set()
    for path in files:
        file = open_parquet(path, environments)
        if "data_source" not in file.schema_arrow.names:
            found.add(NO_SOURCE)
            continue
        for batch in read_batches(file, path, ROW_GROUP_SIZE, ["data_source"]):
            try:
                found |= set(batch.column("data_source").unique().to_pylist())
            except UnicodeDecodeError:  # reported with its number when the row is read
                continue
    return {source for source in found if source is not None}


def records_of(
    batches: Iterable[pa.RecordBatch], path: str | Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file's batches, each with where it is. ValueError where one cannot be read."""
    number = 0
    for batch in batches:
        for offset in range(batch.num_rows):
            where = f"{path}: row {number}"
            yield where, record_of(batch, offset, where)
            number += 1


def record_of(batch: pa.RecordBatch, offset: int, where: str) -> dict[str, Any]:
    """One row as plain values.

    ValueError, starting with `where` and naming the column, where a value cannot be read.
    """
    record = {}
    for name in batch.schema.names:
        try:
            record[name] = batch.column(name)[offset].as_py()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: {name} holds bytes that are not UTF-8; write the file again"
            ) from error
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise ValueError(
                f"{where}: {name} holds what cannot be read: {one_line(error)}; "
                "write the file again"
            ) from error
    return record


def iter_rows(path: str | Path) -> Iterator[PromptRow]:
    """The rows of one file, a row group at a time; columns that are not a prompt's are ignored.

    ValueError that names the file, the column (or row) and the fix.
    """
    batches = read_batches(open_parquet(path), path, ROW_GROUP_SIZE)
    for where, record in records_of(batches, path):
        yield row_of(record, where)


def read_parquet(path: str | Path) -> list[PromptRow]:
    """All rows of one file; see `iter_rows`."""
    return list(iter_rows(path))


def copy_rows(path: str | Path, to: Path, count: int) -> None:
    """Write the first `count` rows of a file, all columns; again from the first where it has less.

    ValueError as `open_parquet`.
    """
    file = open_parquet(path, environments=True)
    taken: list[pa.RecordBatch] = []
    for batch in read_batches(file, path, count, file.schema_arrow.names):
        taken.append(batch)
        if sum(part.num_rows for part in taken) >= count:
            break
    rows = pa.Table.from_batches(taken)
    whole = pa.concat_tables([rows] * -(-count // rows.num_rows))
    pq.write_table(whole.slice(0, count), to)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What `write_parquet` noted of the file's origin; empty for files of other writers."""
    metadata = open_parquet(path, environments=True).metadata.metadata or {}
    return dict(json.loads(metadata.get(_PROVENANCE_KEY, b"{}")))


def one_line(error: Exception) -> str:
    """A library's message in one line."""
    return " ".join(str(error).split())[:200]
