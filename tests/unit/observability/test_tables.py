"""Rows as tables and JSON: alignment, decimals, empty cells, lines that are never wrapped."""

from __future__ import annotations

import json

import pytest

from rlhf3d.observability.tables import Row, View, table

ROWS: list[Row] = [
    {"name": "[bold]a", "count": 3, "share": 0.25},
    {},
    {"name": "b", "count": 12, "share": None},
]


def shown(view: View, capsys: pytest.CaptureFixture[str], as_json: bool = False) -> str:
    view.show(as_json)
    return capsys.readouterr().out


def test_numbers_are_aligned_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(View([table(ROWS, "title", digits=2)], None), capsys)
    cells = [[cell for cell in line.split("│") if cell] for line in text.splitlines()]
    rows = [row for row in cells if len(row) == 3]
    assert [row[1] for row in rows] == ["     3 ", "    12 "]
    assert [row[2].strip() for row in rows] == ["0.25", ""]
    assert rows[0][0].strip() == "[bold]a"  # no markup
    assert text.splitlines()[0].startswith("title")


def test_no_rows_are_an_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(View([table([])], None), capsys).strip() == ""


def test_without_a_terminal_tables_are_as_wide_as_they_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows: list[Row] = [{"text": "word " * 20, "count": 1}]
    assert "word " * 20 in shown(View([table(rows)], None), capsys)
    monkeypatch.setenv("COLUMNS", "60")
    assert "word " * 20 not in shown(View([table(rows)], None), capsys)


def test_lines_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    line = "word " * 100
    assert shown(View([line], None), capsys) == f"{line}\n"


def test_json_is_the_data_alone(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"rows": [1, "ü"], "none": None}
    assert json.loads(shown(View(["text"], data), capsys, as_json=True)) == data
