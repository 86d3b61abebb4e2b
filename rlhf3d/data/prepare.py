"""`rlhf3d data prepare NAME`: from a data set as its authors publish it to train.parquet and test.parquet.

Invariant: the same source and options give the same bytes, every row that did not become a prompt is counted with
its reason, and the files of a set appear together or not at all.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf3d.data.rows import (
    ROW_GROUP_SIZE,
    PromptRow,
    iter_rows,
    question_key,
    row_of,
    write_parquet,
)
from rlhf3d.data.sources import HUB, SourceSplit, file_sha256, open_source
from rlhf3d.user_code import guarded, load_file

SETS = ("arithmetic", "gsm8k", "limr", "math", "math500")
DEFAULT_SPLITS = ("train", "test")
EXCLUDED = "its question is in an excluded file"


class BrokenSet(ValueError):
    """A user's data set failed otherwise than by refusing a row."""


@dataclass
class PreparedFile:
    """One file written."""

    split: str
    path: str
    rows: int = 0
    sha256: str = ""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why rows of the source did not become prompts, and how many."""
    notes: tuple[str, ...] = ()
    """What the set's user should know."""

    @property
    def dropped(self) -> int:
        """Rows of the source that did not become prompts."""
        return sum(self.reasons.values())


def prepare(
    name: str,
    source: str | Path | None,
    output: str | Path,
    *,
    split: str | None = None,
    exclude: Sequence[str | Path] = (),
    revision: str | None = None,
    row_group_size: int = ROW_GROUP_SIZE,
    **options: Any,
) -> list[PreparedFile]:
    """Write the splits of data set `name` to `output`/{train,test}.parquet and say what was written.

    `name` is one of `SETS`, or a Python file with a `make_map_fn(split, …)`. `source` is a folder or file (jsonl,
    json, parquet, arrow), "hub" to download it, or null where the data are generated; `split` says which one a lone
    file holds. Rows with a question of the prompt files `exclude` are left out. `options` go to the set. Raises
    ValueError, naming the fix, for an unknown name or option, and for a source that is missing or without usable rows.
    """
    module = load_set(name)
    _check_options(name, module, options)
    left_out = {question_key(row) for path in exclude for row in iter_rows(path)}
    splits = _splits(name, module, source, split, revision, options)
    folder = Path(output)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        written = []
        for part, to_row in splits:
            file = PreparedFile(
                part.name, str(partial / f"{part.name}.parquet"), notes=getattr(module, "NOTES", ())
            )
            _write(name, part, to_row, left_out, options, row_group_size, file)
            written.append(file)
        folder.mkdir(parents=True, exist_ok=True)
        for file in written:
            final = folder / f"{file.split}.parquet"
            os.replace(file.path, final)
            file.path = str(final)
        return written
    finally:
        shutil.rmtree(partial)


def load_set(name: str) -> Any:
    """The module of a data set: a shipped one, or a user's file with a `make_map_fn`."""
    if name.endswith(".py"):
        module = load_file(name, "data set")
        if not callable(getattr(module, "make_map_fn", None)):
            raise ValueError(
                f"{name}: no function make_map_fn(split) in it; it must return fn(row, index) -> prompt row"
            )
        return module
    if name not in SETS:
        raise ValueError(
            f"no data set {name!r}; known are {', '.join(SETS)}, or give a Python file with a make_map_fn"
        )
    return importlib.import_module(f"rlhf3d.data.sets.{name}")


def _check_options(name: str, module: Any, options: dict[str, Any]) -> None:
    function = getattr(module, "generate", None) or module.make_map_fn
    known = [p for p in inspect.signature(function).parameters if p not in ("split", "data_source")]
    for option in options:
        if option not in known:
            raise ValueError(
                f"data set {name} has no option {option!r}; it has {', '.join(known) or 'none'}"
            )


ToRow = Callable[[Any, int], Any]


def _splits(
    name: str,
    module: Any,
    source: str | Path | None,
    split: str | None,
    revision: str | None,
    options: dict[str, Any],
) -> list[tuple[SourceSplit, ToRow]]:
    """Each split with what makes prompts of its rows."""
    if hasattr(module, "generate"):
        # Read at once: the body of a generator would run outside of the guard.
        generate = _guarded(name, lambda **given: [list(rows) for rows in module.generate(**given)])
        if source is not None:
            raise ValueError(
                f"{name} is generated and takes no source (got {source}); leave it out"
            )
        if split is not None or revision is not None:
            raise ValueError(
                f"{name} is generated: --split and --revision are for a source; leave them out"
            )
        parts = zip(DEFAULT_SPLITS, generate(**options), strict=True)
        origin = {"source": "generated"}
        return [
            (SourceSplit(part, rows, dict(origin)), lambda row, index: row)
            for part, rows in parts
            if rows
        ]
    hub = getattr(module, "HUB", None)
    if source is None:
        where = (
            f" from https://huggingface.co/datasets/{hub[0]}, or {HUB!r} to download it"
            if hub
            else ""
        )
        raise ValueError(
            f"{name} needs a source: a folder with its files (jsonl, json, parquet or arrow){where}"
        )
    known = getattr(module, "SPLITS", DEFAULT_SPLITS)
    if split is not None and split not in known:
        raise ValueError(f"--split {split}: {name} has {', '.join(known)}")
    found = open_source(name, str(source), hub, known, split, revision)
    make = _guarded(name, module.make_map_fn)
    return [(part, _guarded(name, make(part.name, **options))) for part in found]


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the set `name`; ValueErrors of a user's pass, all else it raises is one that says so."""
    if not name.endswith(".py"):
        return function
    guard = guarded(function, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return guard(*args, **kwargs)
        except ValueError:
            raise
        except Exception as error:
            asked = f" on row {args[1]} {str(args[0])[:200]}" if len(args) == 2 else ""
            raise BrokenSet(
                f"{name}: make_map_fn fails{asked}: {type(error).__name__}: {error}"
            ) from error

    return call


def _write(
    name: str,
    part: SourceSplit,
    to_row: ToRow,
    left_out: set[str],
    options: dict[str, Any],
    row_group_size: int,
    file: PreparedFile,
) -> None:
    provenance = {
        "name": Path(name).name,
        "split": part.name,
        "options": options,
        "rlhf3d": _version(),
        "dropped": file.reasons,  # filled while the rows are written
        **part.origin,
    }
    path = Path(file.path)
    rows = _rows(part, to_row, left_out, file.reasons)
    try:
        first = next(rows)
    except StopIteration:
        reasons = "; ".join(
            f"{count} because {reason}" for reason, count in file.reasons.most_common(3)
        )
        why = f"{file.dropped} dropped: {reasons}" if file.dropped else "its files are empty"
        raise ValueError(f"{name}: no usable row in the {part.name} split ({why})") from None
    file.rows = write_parquet(_with_first(first, rows), path, provenance, row_group_size)
    file.sha256 = file_sha256(path)


def _with_first(first: PromptRow, rest: Iterator[PromptRow]) -> Iterator[PromptRow]:
    yield first
    yield from rest


def _rows(
    part: SourceSplit, to_row: ToRow, left_out: set[str], reasons: Counter[str]
) -> Iterator[PromptRow]:
    for index, source_row in enumerate(part.rows):
        try:
            made = to_row(source_row, index)
            row = made if isinstance(made, PromptRow) else row_of(made, "make_map_fn's result")
        except BrokenSet:
            raise
        except ValueError as error:
            reasons[str(error)[:120]] += 1
            continue
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"make_map_fn fails on row {index} of the {part.name} split, {str(source_row)[:200]}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if left_out and question_key(row) in left_out:
            reasons[EXCLUDED] += 1
            continue
        yield row


def _version() -> str:
    try:
        return version("rlhf3d")
    except PackageNotFoundError:
        return "unknown"
