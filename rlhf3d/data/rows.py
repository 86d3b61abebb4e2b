"""Prompt rows in parquet: the one file format that training, validation and preparation share.

Invariant: what is written reads back equal, the same rows give the same bytes, a file is either complete or absent,
and reading or writing holds one row group at a time. The columns are verl's, so its users' files load unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf3d.data.messages import NOT_TEXT, asked, read_prompt, read_tools, without_nulls
from rlhf3d.paths import refuse_pointer

MESSAGE = pa.struct([pa.field("content", pa.string()), pa.field("role", pa.string())])
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
OPTIONAL_COLUMNS = ("ability", "extra_info", "tools")
ROW_GROUP_SIZE = 4096
_PROVENANCE_KEY = b"rlhf3d.provenance"


@dataclass(frozen=True)
class PromptRow:
    """One prompt and what its completions are checked against."""

    data_source: str
    """Names the scorer of this row."""
    prompt: list[dict[str, Any]]
    """Chat messages, each {"role": ..., "content": ...} and perhaps name, tool_calls and the like."""
    ability: str
    """Kind of task, for example "math"."""
    reward_model: dict[str, Any]
    """{"style": "rule", "ground_truth": ...}; {"style": "model"} for a reward model alone."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Anything else; usually split, index, question and answer."""
    tools: list[Any] = field(default_factory=list)
    """JSON schemas of the tools that the prompt offers."""

    @property
    def ground_truth(self) -> Any:
        """What a rule compares with; None in rows for a reward model."""
        return self.reward_model.get("ground_truth")

    @property
    def question(self) -> str:
        """The last message that is not the assistant's."""
        return asked(self.prompt)


def question_key(row: PromptRow) -> str:
    """The question of a row without what data sets change: instruction, spacing, case."""
    question = row.extra_info.get("question")
    text = question if isinstance(question, str) and question else row.question
    return "".join(text.split()).lower()


def schema_of(rows: Iterable[PromptRow]) -> pa.Schema:
    """Arrow schema of `rows`: fixed except for the keys of `reward_model` and `extra_info`, which are theirs, and for
    messages with more than a role and a text."""
    rows = list(rows)
    plain = all(message.keys() == {"role", "content"} for row in rows for message in row.prompt)
    fields = [
        pa.field("data_source", pa.string()),
        pa.field(
            "prompt", pa.list_(MESSAGE) if plain else pa.infer_type([row.prompt for row in rows])
        ),
        pa.field("ability", pa.string()),
        pa.field("reward_model", pa.infer_type([row.reward_model for row in rows])),
    ]
    if any(row.extra_info for row in rows):  # parquet has no struct without fields
        fields.append(pa.field("extra_info", pa.infer_type([row.extra_info for row in rows])))
    if any(row.tools for row in rows):
        fields.append(pa.field("tools", pa.string()))
    return pa.schema(fields)


def _record(row: PromptRow) -> dict[str, Any]:
    """A row as it is written: tools as JSON text, as their schemas differ."""
    return {**asdict(row), "tools": json.dumps(row.tools) if row.tools else None}


def write_parquet(
    rows: Iterable[PromptRow],
    path: str | Path,
    provenance: Mapping[str, Any],
    row_group_size: int = ROW_GROUP_SIZE,
) -> int:
    """Write `rows` to `path` through a temporary file; returns how many.

    `provenance` is put into the file's metadata as JSON, once the last row was taken, so it may be filled meanwhile.
    The first row group fixes the schema. Raises ValueError where there are no rows, or where a later row has other
    keys, or other types under them.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows, count = iter(rows), 0
    try:
        with ExitStack() as stack:
            writer = None
            while group := list(islice(rows, row_group_size)):
                if writer is None:
                    schema = schema_of(group)
                    writer = stack.enter_context(pq.ParquetWriter(temporary, schema))
                _check_keys(group, schema, count, path)
                writer.write_table(
                    pa.Table.from_pylist([_record(row) for row in group], schema=schema)
                )
                count += len(group)
            if writer is None:
                raise ValueError(f"{path}: no rows to write")
            writer.add_key_value_metadata(
                {_PROVENANCE_KEY: json.dumps(provenance, sort_keys=True).encode()}
            )
        os.replace(temporary, path)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: give each key of reward_model and extra_info one type: {error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _check_keys(rows: list[PromptRow], schema: pa.Schema, first: int, path: Path) -> None:
    """pyarrow leaves keys that the schema lacks out in silence."""
    for number, row in enumerate(rows, start=first):
        parts = {
            "reward_model": [row.reward_model],
            "extra_info": [row.extra_info],
            "prompt": row.prompt,
        }
        for column, structs in parts.items():
            known = _struct_keys(schema, column)
            if extra := {key for struct in structs for key in struct} - known:
                raise ValueError(
                    f"{path}: row {number} has {column} {sorted(extra)}, which the first {ROW_GROUP_SIZE} rows lack; "
                    "give every row the same keys"
                )
        if row.tools and "tools" not in schema.names:
            raise ValueError(
                f"{path}: row {number} has tools, which the first {ROW_GROUP_SIZE} rows lack"
            )


def _struct_keys(schema: pa.Schema, name: str) -> set[str]:
    if name not in schema.names:
        return set()
    kind = schema.field(name).type
    return {f.name for f in (kind.value_type if pa.types.is_list(kind) else kind)}


def iter_rows(path: str | Path) -> Iterator[PromptRow]:
    """Rows of one file, a row group at a time; `ability` and `extra_info` may be absent, other columns are left aside.

    Raises ValueError naming the file, the column (or row) and the fix.
    """
    file = open_parquet(path)
    number = 0
    for batch in read_batches(file, path, ROW_GROUP_SIZE):
        for offset in range(batch.num_rows):
            yield row_of(record_of(batch, offset, f"{path}: row {number}"), f"{path}: row {number}")
            number += 1


def read_batches(file: pq.ParquetFile, path: str | Path, size: int) -> Iterator[Any]:
    """Batches of a file's prompt columns; ValueError, naming the file, where it is damaged."""
    try:
        yield from file.iter_batches(
            size, columns=prompt_columns(file.schema_arrow), use_threads=False
        )
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read: {one_line(error)}; it is damaged, so copy or prepare it again"
        ) from error


def one_line(error: Exception) -> str:
    """A library's message in one line."""
    return " ".join(str(error).split())[:200]


def record_of(batch: Any, offset: int, where: str) -> dict[str, Any]:
    """One row of a batch; ValueError, starting with `where` and naming the column, where a value cannot be read."""
    record = {}
    for name in batch.schema.names:
        try:
            record[name] = batch.column(name)[offset].as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            text = (
                "bytes that are not UTF-8"
                if isinstance(error, UnicodeDecodeError)
                else f"what cannot be read: {one_line(error)}"
            )
            raise ValueError(f"{where}: {name} holds {text}; write the file again") from error
    return record


def read_parquet(path: str | Path) -> list[PromptRow]:
    """All rows of one file; see `iter_rows`."""
    return list(iter_rows(path))


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What `write_parquet` noted about the file's origin; empty for files of other writers."""
    metadata = open_parquet(path, rows_needed=False).metadata.metadata or {}
    return dict(json.loads(metadata.get(_PROVENANCE_KEY, b"{}")))


def open_parquet(path: str | Path, rows_needed: bool = True) -> pq.ParquetFile:
    """A file of prompts, memory-mapped; ValueError where it is missing, unreadable, without a needed column or row."""
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
        if columns.count(column) > 1:
            raise ValueError(
                f"{path}: column {column!r} stands in it {columns.count(column)} times; keep one of them"
            )
    for column in REQUIRED_COLUMNS if rows_needed else ():
        if column not in columns:
            raise ValueError(
                f"{path}: no column {column!r} (it has: {', '.join(columns)}). Prompts need "
                f"{', '.join(REQUIRED_COLUMNS)}; `rlhf3d data prepare` writes such files"
            )
    if rows_needed and not _is_text(kind := file.schema_arrow.field("data_source").type):
        raise ValueError(
            f"{path}: column 'data_source' must be text, not {kind}; write its names as text"
        )
    if rows_needed and not file.metadata.num_rows:
        raise ValueError(f"{path}: the file has no rows; prepare it again or name another file")
    return file


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is some kind of text; of nulls, the rows say what is missing."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_null,
    )
    return any(is_kind(kind) for is_kind in texts)


def prompt_columns(schema: pa.Schema) -> list[str]:
    """Those columns of a file that make a `PromptRow`."""
    known = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *NOT_TEXT)
    return [name for name in known if name in schema.names]


def row_of(record: Mapping[str, Any], where: str) -> PromptRow:
    """A record as a row; ValueError, starting with `where`, for one that cannot be used."""
    if not isinstance(record["data_source"], str):
        raise ValueError(f"{where}: data_source must be text, not {record['data_source']!r}")
    reward_model = _struct(record["reward_model"], f"{where}: reward_model")
    if reward_model.get("style") != "model" and reward_model.get("ground_truth") is None:
        raise ValueError(
            f"{where}: reward_model must be a struct with a ground_truth, or of style model, not "
            f"{record['reward_model']!r}"
        )
    for column in NOT_TEXT:
        if without_nulls(record.get(column)) not in (None, [], {}, "", b""):
            raise ValueError(
                f"{where}: {column} is not empty: prompts are text alone; leave the row out"
            )
    return PromptRow(
        data_source=record["data_source"],
        prompt=read_prompt(record["prompt"], where),
        ability=_text(record.get("ability"), f"{where}: ability"),
        reward_model=reward_model,
        extra_info=_struct(record.get("extra_info"), f"{where}: extra_info"),
        tools=read_tools(record.get("tools"), where),
    )


def _struct(value: Any, what: str) -> dict[str, Any]:
    """A struct, a map (which arrow gives as pairs) or a JSON object as text; ValueError for anything else."""
    found = value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = value
    elif isinstance(value, list) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in value
    ):
        found = dict(value)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a struct, not {type(value).__name__} {str(value)[:80]!r}")
    return found


def _text(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {type(value).__name__} {str(value)[:80]!r}")
    return value or ""
