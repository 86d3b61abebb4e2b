"""`rlhf3d samples`: the right ones, all counted, nothing a terminal would obey."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.commands.results import Filters
from rlhf3d.evaluation.browse import clean, load
from rlhf3d.evaluation.records import Generation, append_generations
from rlhf3d.observability.samples import Sample, write_samples

RIGHT = Sample("2+3?", "It is\n5 \x1b[31m", "5", 1.0, "scored", 7, "stop", 3)
WRONG = replace(RIGHT, response="six 6", score=0.0, answer="6")
NONE = replace(RIGHT, response="dunno", score=0.0, outcome="unparsable", finish_reason="length")
LATE = replace(RIGHT, response="9^9^9", score=0.0, outcome="timeout")
ALL = [RIGHT, WRONG, NONE, LATE]
TURNS = [{"role": "assistant", "content": "open\x1b 1"}, {"role": "tool", "content": "a key"}]


def show(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, ["samples", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (Filters(), ALL),
        (Filters(wrong=True), [WRONG]),
        (Filters(right=True), [RIGHT]),
        (Filters(unparsable=True), [NONE]),
        (Filters(failed=True), [LATE]),
        (Filters(truncated=True), [NONE]),
        (Filters(contains="SIX"), [WRONG]),
        (Filters(contains="2+3"), ALL),
        (Filters(wrong=True, truncated=True), []),
    ],
)
def test_filters(wanted: Filters, kept: list[Sample]) -> None:
    assert [sample for sample in ALL if wanted.keeps(sample)] == kept


def test_all_turns_are_shown_and_searched(tmp_path: Path) -> None:
    talk = replace(WRONG, outcome="env_error", turns=TURNS)
    write_samples(tmp_path, 1, [talk, RIGHT])
    text = show(tmp_path, "--contains", "A KEY")
    assert "[assistant] open· 1\n[tool] a key\n" in text and "1 of 1 shown, 2 in all" in text
    assert "env_error, score env_error" in show(tmp_path, "--failed")


def test_a_runs_last_step_is_shown_unless_another_is_asked(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, [RIGHT])
    write_samples(tmp_path, 12, ALL)
    write_samples(tmp_path, 12, [NONE], "greedy")
    text = show(tmp_path)
    assert "train step 12: 4 of 4 shown, 4 in all" in " ".join(text.split())
    assert "\x1b" not in text and "5 ·[31m" in text and "wanted 5; 7 tokens, cut off" in text
    assert "scored, score 0, answer 6, wanted 5; 7 tokens" in text
    assert "step 1: 1 of 1" in " ".join(show(tmp_path, "--step", 1).split())
    assert "six" not in show(tmp_path, "--kind", "greedy")
    limited = show(tmp_path, "--limit", 1, "--wrong")
    assert (
        "six" in limited
        and "dunno" not in limited
        and "1 of 1 shown, 4 in all" in " ".join(limited.split())
    )
    assert [
        json.loads(line)["response"] for line in show(tmp_path, "--json", "--failed").splitlines()
    ] == ["9^9^9"]


def test_an_evaluations_generations_are_shown(tmp_path: Path) -> None:
    base = Generation("greedy", 0, 0, "m", "2+3?", "It is 5", "5", "5", 1.0, "scored", 7, "stop")
    append_generations(
        tmp_path, [base, replace(base, mode="sampled", response="six", answer="6", score=0.0)]
    )
    with (tmp_path / "generations.jsonl").open("a") as file:
        file.write('{"mode": "gre')  # still being written: shown without, and left as it is
    before = (tmp_path / "generations.jsonl").read_bytes()
    assert "It is 5" in show(tmp_path) and "six" in show(tmp_path, "--wrong")
    assert "six" not in show(tmp_path, "--kind", "greedy")
    assert (tmp_path / "generations.jsonl").read_bytes() == before


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no train samples .*kinds there: none"):
        load(tmp_path, None, None)
    write_samples(tmp_path, 3, [RIGHT], "greedy")
    with pytest.raises(ValueError, match=r"no train samples .*kinds there: greedy"):
        load(tmp_path, None, None)
    with pytest.raises(ValueError, match=r"--step 4: greedy samples are there for 3"):
        load(tmp_path, 4, "greedy")
    with pytest.raises(ValueError, match=r"--kind all: must be one of train, greedy, sampled"):
        load(tmp_path, None, "all")


def test_clean_keeps_lines_and_shows_the_rest() -> None:
    assert clean("a\tb\nc\x1b[2J\r\u202e") == "a b\nc·[2J··"
