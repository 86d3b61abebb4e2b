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

MESSAGE = pa.struct([pa.field("content", pa.string()), pa.field("role", pa.string())])
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
OPTIONAL_COLUMNS = ("ability", "extra_info")
ROW_GROUP_SIZE = 4096
_PROVENANCE_KEY = b"rlhf3d.provenance"


@dataclass(frozen=True)
class PromptRow:
    """One prompt and what its completions are checked against."""

    data_source: str
    """Names the scorer of this row."""
    prompt: list[dict[str, str]]
    """Chat messages, each {"role": ..., "content": ...}."""
    ability: str
    """Kind of task, for example "math"."""
    reward_model: dict[str, Any]
    """{"style": "rule", "ground_truth": ...}; {"style": "model"} for a reward model alone."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Anything else; usually split, index, question and answer."""

    @property
    def ground_truth(self) -> Any:
        """What a rule compares with; None in rows for a reward model."""
        return self.reward_model.get("ground_truth")


def schema_of(rows: Iterable[PromptRow]) -> pa.Schema:
    """Arrow schema of `rows`: fixed but for the keys of `reward_model` and `extra_info`, which are theirs."""
    rows = list(rows)
    fields = [
        pa.field("data_source", pa.string()),
        pa.field("prompt", pa.list_(MESSAGE)),
        pa.field("ability", pa.string()),
        pa.field("reward_model", pa.infer_type([row.reward_model for row in rows])),
    ]
    if any(row.extra_info for row in rows):  # parquet has no struct without fields
        fields.append(pa.field("extra_info", pa.infer_type([row.extra_info for row in rows])))
    return pa.schema(fields)


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
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in group], schema=schema))
                count += len(group)
            if writer is None:
                raise ValueError(f"{path}: no rows to write")
            writer.add_key_value_metadata({_PROVENANCE_KEY: json.dumps(provenance, sort_keys=True).encode()})
        os.replace(temporary, path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: give each key of reward_model and extra_info one type: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _check_keys(rows: list[PromptRow], schema: pa.Schema, first: int, path: Path) -> None:
    """pyarrow leaves keys that the schema lacks out in silence."""
    known = {name: _struct_keys(schema, name) for name in ("reward_model", "extra_info")}
    for number, row in enumerate(rows, start=first):
        for column, keys in known.items():
            if extra := set(getattr(row, column)) - keys:
                raise ValueError(
                    f"{path}: row {number} has {column} {sorted(extra)}, which the first {ROW_GROUP_SIZE} rows lack; "
                    "give every row the same keys"
                )


def _struct_keys(schema: pa.Schema, name: str) -> set[str]:
    return {f.name for f in schema.field(name).type} if name in schema.names else set()


def iter_rows(path: str | Path) -> Iterator[PromptRow]:
    """Rows of one file, a row group at a time; `ability` and `extra_info` may be absent, other columns are left aside.

    Raises ValueError naming the file, the column (or row) and the fix.
    """
    file = open_parquet(path)
    number = 0
    for batch in file.iter_batches(ROW_GROUP_SIZE, columns=prompt_columns(file.schema_arrow), use_threads=False):
        for record in batch.to_pylist():
            yield row_of(record, f"{path}: row {number}")
            number += 1


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
        raise ValueError(f"{path}: no such file; `rlhf3d data prepare` writes prompt files")
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error}); `rlhf3d data prepare` writes them") from error
    columns = file.schema_arrow.names
    for column in REQUIRED_COLUMNS if rows_needed else ():
        if column not in columns:
            raise ValueError(
                f"{path}: no column {column!r} (it has: {', '.join(columns)}). Prompts need "
                f"{', '.join(REQUIRED_COLUMNS)}; `rlhf3d data prepare` writes such files"
            )
    if rows_needed and not file.metadata.num_rows:
        raise ValueError(f"{path}: the file has no rows; prepare it again or name another file")
    return file


def prompt_columns(schema: pa.Schema) -> list[str]:
    """Those columns of a file that make a `PromptRow`."""
    return [name for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS) if name in schema.names]


def row_of(record: Mapping[str, Any], where: str) -> PromptRow:
    """A record as a row; ValueError, starting with `where`, for one that cannot be used."""
    if not isinstance(record["data_source"], str):
        raise ValueError(f"{where}: data_source must be text, not {record['data_source']!r}")
    reward_model = record["reward_model"]
    by_rule = not isinstance(reward_model, dict) or reward_model.get("style") != "model"
    if by_rule and (not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None):
        raise ValueError(
            f"{where}: reward_model must be a struct with a ground_truth, or of style model, not {reward_model!r}"
        )
    return PromptRow(
        data_source=record["data_source"],
        prompt=_messages(record["prompt"], where),
        ability=record.get("ability") or "",
        reward_model=reward_model,
        extra_info=record.get("extra_info") or {},
    )


def _messages(prompt: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise ValueError(
            f"{where}: prompt must be a list of chat messages with text, "
            f'[{{"role": "user", "content": "..."}}], not {str(prompt)[:80]!r}'
        )
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
