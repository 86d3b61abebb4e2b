"""Prompt rows in parquet: the one file format that training, validation and preparation share.

Invariant: what is written reads back equal, the same rows give the same bytes, and a file is either
complete or absent. The columns are verl's, so its users' files load unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MESSAGE = pa.struct([pa.field("content", pa.string()), pa.field("role", pa.string())])
REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
OPTIONAL_COLUMNS = ("ability", "extra_info")
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
    """{"style": "rule", "ground_truth": ...}."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Anything else; usually split, index, question and answer."""


def schema_of(rows: Sequence[PromptRow]) -> pa.Schema:
    """Arrow schema of `rows`: fixed but for the keys of `reward_model` and `extra_info`, which are theirs."""
    fields = [
        pa.field("data_source", pa.string()),
        pa.field("prompt", pa.list_(MESSAGE)),
        pa.field("ability", pa.string()),
        pa.field("reward_model", pa.infer_type([row.reward_model for row in rows])),
    ]
    if any(row.extra_info for row in rows):  # parquet has no struct without fields
        fields.append(pa.field("extra_info", pa.infer_type([row.extra_info for row in rows])))
    return pa.schema(fields)


def write_parquet(rows: Sequence[PromptRow], path: str | Path, provenance: dict[str, Any]) -> None:
    """Write `rows` to `path` through a temporary file, with `provenance` (JSON) in the file's metadata.

    Raises ValueError where there are no rows, or where a key's values have different types over the rows.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        metadata = {_PROVENANCE_KEY: json.dumps(provenance, sort_keys=True).encode()}
        schema = schema_of(rows).with_metadata(metadata)
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)
        os.replace(temporary, path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: give each key of reward_model and extra_info one type: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_parquet(path: str | Path) -> list[PromptRow]:
    """Rows of one file; `ability` and `extra_info` may be absent, other columns are left aside.

    Raises ValueError naming the file, the column (or row) and the fix.
    """
    file = _open(path)
    columns = file.schema_arrow.names
    for column in REQUIRED_COLUMNS:
        if column not in columns:
            raise ValueError(
                f"{path}: no column {column!r} (it has: {', '.join(columns)}). Prompts need "
                f"{', '.join(REQUIRED_COLUMNS)}; `rlhf3d data prepare` writes such files"
            )
    wanted = [name for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS) if name in columns]
    records = file.read(columns=wanted, use_threads=False).to_pylist()
    if not records:
        raise ValueError(f"{path}: the file has no rows; prepare it again or name another file")
    return [_row(record, f"{path}: row {i}") for i, record in enumerate(records)]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What `write_parquet` noted about the file's origin; empty for files of other writers."""
    metadata = _open(path).schema_arrow.metadata or {}
    return dict(json.loads(metadata.get(_PROVENANCE_KEY, b"{}")))


def _open(path: str | Path) -> pq.ParquetFile:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; `rlhf3d data prepare` writes prompt files")
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error}); `rlhf3d data prepare` writes them") from error


def _row(record: dict[str, Any], where: str) -> PromptRow:
    if not isinstance(record["data_source"], str):
        raise ValueError(f"{where}: data_source must be text, not {record['data_source']!r}")
    reward_model = record["reward_model"]
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
        raise ValueError(f"{where}: reward_model must be a struct with a ground_truth, not {reward_model!r}")
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
