"""`data check` without the scorers: lengths, duplicates and questions that files share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.data.check import CheckReport, check_files, histogram
from rlhf3d.data.check_view import check_view
from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow
from rlhf3d.rehearsal.miniature import CHAT_TEMPLATE, TOOLS, byte_tokenizer


def row(question: str) -> PromptRow:
    return PromptRow(
        "openai/gsm8k", [{"role": "user", "content": question}], "math", {"ground_truth": "4"}
    )


def test_lengths_duplicates_and_overlap_are_warned_of(tmp_path: Path) -> None:
    write_parquet([row("a"), row("b " * 60), row("A ")], tmp_path / "train.parquet", {})
    write_parquet([row("c"), row("a")], tmp_path / "test.parquet", {})
    train, test = check_files(
        [tmp_path / "train.parquet", tmp_path / "test.parquet"], make_tiny_tokenizer(), 64
    )
    assert (train.overlong, train.duplicates, train.overlap) == (1, 1, {test.path: 1})
    assert train.problems == test.problems == []
    text = "\n".join(train.warnings)
    assert "1 of 3 prompts are over data.max_prompt_length=64" in text
    assert (
        "1 questions occur more than once" in text
        and f"1 questions are also in {test.path}" in text
    )
    assert test.warnings == []


def test_rows_are_counted_by_environment(tmp_path: Path) -> None:
    """A file in which some rows name one and others none is warned of."""
    game = replace(row("a"), environment="Game")
    write_parquet([game, replace(row("b"), environment="Maze"), row("c")], tmp_path / "1", {})
    write_parquet([game], tmp_path / "2", {})
    write_parquet([row("d")], tmp_path / "3", {})
    mixed, all_named, none = check_files([tmp_path / name for name in "123"])
    assert mixed.environments == {"Game": 1, "Maze": 1, "": 1}
    # As JSON too, where `asdict` would make something else of a Counter.
    written = json.loads(json.dumps(CheckReport([mixed]).to_json()))
    assert written["files"][0]["environments"] == {"Game": 1, "Maze": 1, "": 1}
    (warning,) = [text for text in mixed.warnings if "environment" in text]
    assert "1 of 3 rows" in warning and "environment.name" in warning
    for check in (all_named, none):
        assert not any("environment" in text for text in check.warnings)
    shown = check_view(CheckReport([mixed, none]))
    lines = [str(part) for part in shown.parts if "environments:" in str(part)]
    assert lines == ["  environments: Game 1, Maze 1"]


def test_tools_of_environments_count_in_the_lengths(tmp_path: Path) -> None:
    """Of a file made for TRL, too; without the environments, the report says what is missing."""
    path = tmp_path / "trl.parquet"
    rows = [
        {"prompt": "Play.", "environment": "Game", "level": 1},
        {"prompt": "Play.", "environment": None, "level": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)

    def offered(columns: Mapping[str, Any]) -> list[Any]:
        if columns["environment"] is None:
            raise ValueError(f"no environment for level {columns['level']}")
        return [{"type": "function", "function": {"name": "guess", "description": "x" * 100}}]

    tokenizer = byte_tokenizer(128, TOOLS + CHAT_TEMPLATE)
    (check,) = check_files([path], tokenizer, offered=offered)
    assert (check.rows, check.unreadable) == (2, ["row 1: no environment for level 2"])
    assert check.longest > 100 and check.warnings == []
    table = pq.read_table(path)
    verl = {"data_source": ["x"] * 2, "reward_model": [{"ground_truth": "1"}] * 2}
    for name, values in {**verl, "prompt": [row("Play.").prompt] * 2}.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)
    (check,) = check_files([path], tokenizer)
    assert check.unreadable == [] and check.longest < 100
    assert any("--environment" in text for text in check.warnings)


def test_histogram_counts_every_length_once() -> None:
    bins = histogram(Counter({1: 2, 50: 3, 100: 1}))
    assert bins == {
        "10": 2,
        "20": 0,
        "30": 0,
        "40": 0,
        "50": 3,
        "60": 0,
        "70": 0,
        "80": 0,
        "90": 0,
        "100": 1,
    }
    assert histogram(Counter()) == {}
