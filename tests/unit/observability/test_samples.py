"""Generations on disk: equal when read back, and paired by prompt for before and after."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rlhf3d.observability.samples import (
    Sample,
    before_after,
    printable,
    read_samples,
    sample_steps,
    samples_path,
    write_samples,
)

SAMPLE = Sample("2+3?", "It is\n5\u2028 \u00e9\x1b[31m\ud800", "5", 1.0, "scored", 7, "stop", 3)


def test_round_trip(tmp_path: Path) -> None:
    samples = [SAMPLE, replace(SAMPLE, score=0.0, outcome="unparsable")]
    path = write_samples(tmp_path, 12, samples)
    assert path == tmp_path / "samples" / "step_12.jsonl"
    assert read_samples(path) == samples
    assert list(path.parent.iterdir()) == [path]


def test_kinds_have_their_own_files(tmp_path: Path) -> None:
    for step in (10, 9):
        write_samples(tmp_path, step, [SAMPLE])
    write_samples(tmp_path, 5, [SAMPLE], "greedy")
    assert sample_steps(tmp_path) == [9, 10]
    assert sample_steps(tmp_path, "greedy") == [5]
    assert sample_steps(tmp_path, "sampled") == []
    assert samples_path(tmp_path, 5, "sampled").name == "sampled_step_5.jsonl"


def test_before_and_after_pair_the_first_prompts(tmp_path: Path) -> None:
    def answers(prompts: str, text: str) -> list[Sample]:
        return [replace(SAMPLE, prompt=p, response=f"{p} {text}") for p in prompts]

    assert before_after(tmp_path) == ([], [])
    write_samples(tmp_path, 0, [*answers("abc", "first"), *answers("a", "second sample")], "greedy")
    assert before_after(tmp_path) == ([], [])
    write_samples(tmp_path, 5, answers("cab", "middle"), "greedy")
    write_samples(tmp_path, 9, answers("cad", "last"), "greedy")
    before, after = before_after(tmp_path)
    assert [s.response for s in before] == ["a first", "c first"]
    assert [s.response for s in after] == ["a last", "c last"]
    assert before_after(tmp_path, limit=1) == (before[:1], after[:1])


def test_printable_text_is_one_clean_line() -> None:
    assert printable("a\n b\x1b[2J\tc") == "a b [2J c"
    assert printable("abcdef", limit=4) == "abc…"
    assert printable("abcd", limit=4) == "abcd"


def test_turns_are_kept_and_files_from_before_them_are_read(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "open 1"}, {"role": "tool", "content": "a key"}]
    talk = replace(SAMPLE, turns=[*turns, {"role": "assistant", "content": "a key"}])
    path = write_samples(tmp_path, 1, [talk])
    assert read_samples(path) == [talk]
    assert talk.transcript == "[assistant] open 1\n[tool] a key\n[assistant] a key"
    old = {name: value for name, value in asdict(SAMPLE).items() if name != "turns"}
    path.write_text(json.dumps(old) + "\n")
    assert read_samples(path) == [SAMPLE] and SAMPLE.transcript == SAMPLE.response
    assert replace(SAMPLE, outcome="env_timeout").mark == "env_timeout"
