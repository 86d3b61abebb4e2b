"""Tokens on disk: equal when read back; differences only where both log-probs are there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlhf3d.observability.samples import SAMPLES_DIR, drop_samples, sample_steps
from rlhf3d.observability.tokens import (
    TokenSpan,
    TrajectoryTokens,
    read_tokens,
    rounded,
    token_steps,
    write_tokens,
)

PROMPT = TokenSpan("prompt", [1, 2], ["What", "\u2028\ud800"])
SAID = TokenSpan("sampled", [3, 4], ["a", ""], ((0, 7), (1, 8)), 0.5, [-0.5, -1.0], [-0.75, None])
HEARD = TokenSpan("environment", [5], ["b"])
ONE = TrajectoryTokens(0, 3, "math", 1.0, "scored", "stop", [[PROMPT, SAID, HEARD], [PROMPT]])


def test_round_trip(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, 12, [ONE, ONE])
    assert path == tmp_path / "samples" / "tokens_step_12.jsonl"
    assert read_tokens(path) == [ONE, ONE]
    assert list(path.parent.iterdir()) == [path]
    assert sample_steps(tmp_path) == [], "no completions of a step"


def test_files_of_one_policy_a_span_are_read(tmp_path: Path) -> None:
    path = write_tokens(tmp_path, 1, [ONE])
    text = path.read_text().replace('"versions": [[0, 7], [1, 8]]', '"policy_version": 7')
    path.write_text(text.replace('"versions": []', '"policy_version": null'))
    spans = read_tokens(path)[0].spans
    assert [span.versions for span in spans] == [(), ((0, 7),), (), ()]


def test_later_steps_are_dropped(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        write_tokens(tmp_path, step, [ONE])
    (tmp_path / SAMPLES_DIR / "tokens_step_12.partial").touch()
    assert token_steps(tmp_path) == [9, 10, 11]
    drop_samples(tmp_path, 9)
    assert token_steps(tmp_path) == [9]


def test_differences() -> None:
    assert SAID.differences == [0.25, math.inf]
    assert HEARD.differences == [None]
    bypass = TokenSpan("sampled", [3], ["a"], ((0, 7),), 0.0, [-0.5])
    assert bypass.differences == [None]
    assert ONE.differences == [0.25, math.inf] and ONE.largest_difference == math.inf
    assert TrajectoryTokens(0, 0, "", 0.0, "scored", "stop", [[bypass]]).largest_difference < 0
    assert ONE.tokens_of("prompt") == 4 and ONE.tokens_of("template") == 0


def test_rounded() -> None:
    assert rounded([-0.1234567, math.nan, -math.inf]) == [
        pytest.approx(-0.12346, abs=1e-9),
        None,
        None,
    ]
