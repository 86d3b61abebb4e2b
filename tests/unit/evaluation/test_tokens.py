"""`rlhf3d samples --tokens`: every token once, the worst found, nothing a terminal would obey."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.evaluation.tokens import chosen, load_tokens
from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens, write_tokens

PROMPT = TokenSpan("prompt", [1, 2], ["2+3", "?"])
CALL = TokenSpan(
    "sampled", [31, 32], ["add", "\x1b[31m"], ((0, 6), (1, 7)), 0.5, [-0.5, -1.0], [-0.5, -1.25]
)
RESULT = TokenSpan("environment", [41], ["five"])
FRAME = TokenSpan("template", [51], ["<|im_end|>"])
ANSWER = TokenSpan("sampled", [61], ["5"], ((0, 8),), 0.0, [-0.1], [-0.9])
TURNS = TrajectoryTokens(
    1, 4, "math", 1.0, "scored", "stop", [[PROMPT, CALL, FRAME, RESULT], [PROMPT, ANSWER]], 8
)
SINGLE = replace(TURNS, number=0, rows=[[PROMPT, CALL]], score=0.0)
BYPASS = replace(TURNS, number=2, rows=[[PROMPT, replace(CALL, old_logprobs=None)]])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tokens(tmp_path, 3, [TURNS])
    write_tokens(tmp_path, 12, [SINGLE, TURNS, BYPASS])
    return tmp_path


def show(*arguments: object) -> str:
    command = ["samples", *map(str, arguments), "--tokens"]
    # Wide: in a narrow terminal texts of cells are folded.
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def cells(text: str) -> list[list[str]]:
    """Of all tables, without their borders."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_who_wrote_which_token(run: Path) -> None:
    text = show(run, "--number", 1)
    assert "\x1b" not in text
    tokens = [row for row in cells(text) if len(row) == 8]
    assert tokens == [
        ["2", "policy 6", "31", "'add'", "-0.50000", "-0.50000", "0.00000", ""],
        ["3", "policy 7", "32", r"'\x1b[31m'", "-1.00000", "-1.25000", "0.25000", "!"],
        ["4", "template", "51", "'<|im_end|>'", "", "", "", ""],
        ["5", "environment", "41", "'five'", "", "", "", ""],
        ["8", "policy 8", "61", "'5'", "-0.10000", "-0.90000", "0.80000", "!!"],
    ]
    # Its row among the step's: tokens of each author, mean and largest difference.
    row = next(row for row in cells(text) if row[:2] == ["1", "4"])
    assert row[6:] == ["2", "2", "4", "3", "1", "1", "0.3500", "0.8000"]
    assert "Row 2 of 2" in text and "reward 0.5" in text
    # Of the second turn alone the difference is one of engines.
    assert "by policy 6, 7 (policy 8 is trained)" in text and "by policy 8 ·" in text


def test_the_first_of_the_last_step_unless_another_is_asked(run: Path) -> None:
    assert "step 12" in show(run) and "Tokens of trajectory 0" in show(run)
    assert "step 3" in show(run, "--step", 3)
    assert json.loads(show(run, "--worst", "--json"))["number"] == 1
    read = json.loads(show(run, "--json", "--number", 2))
    assert read["rows"][0][1]["token_ids"] == [31, 32]
    assert read["rows"][0][1]["old_logprobs"] is None


def test_without_any_difference_the_first_is_the_worst() -> None:
    assert chosen([BYPASS, replace(BYPASS, number=3)], None, worst=True).number == 2


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--step 4: .*2 steps, 3 to 12"):
        load_tokens(run, 4)
    with pytest.raises(ValueError, match=r"--number 3: .*0 to 2.*trainer\.sample_tokens"):
        chosen(load_tokens(run, 12)[1], 3, worst=False)
    with pytest.raises(ValueError, match=r"trainer\.sample_tokens"):
        load_tokens(tmp_path / "other", None)
