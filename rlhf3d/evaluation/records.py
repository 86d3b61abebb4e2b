"""Generations of an evaluation on disk: one JSON object a line, added as they come.

Invariant: a line that ends in a newline is whole, and what follows the last one is dropped when the file is opened
again; so an evaluation that was cut off continues after its last complete generation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf3d.experience.accuracy import Answers, summarise
from rlhf3d.rewards.math_answer import normalise

GENERATIONS_FILE = "generations.jsonl"
GROUPS = ("level", "type", "template")
"""Keys of extra_info that results are broken down by, beside the data source."""

Mode = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Generation:
    """One completion and its score."""

    mode: Mode
    index: int
    """Number of the row, counted through all the files."""
    sample: int
    """Number of the completion of this prompt."""
    data_source: str
    prompt: str
    response: str
    ground_truth: str
    answer: str | None
    """What the scorer read as the answer."""
    score: float
    """1 is right."""
    outcome: str
    """scored, unparsable, timeout or error."""
    length: int
    """Response tokens."""
    finish_reason: str
    """stop or length."""
    groups: dict[str, str] = field(default_factory=dict)
    """Level, type and the like of the row."""

    @property
    def vote(self) -> str | None:
        """The answer in the form that is counted for maj@k."""
        return None if self.answer is None or self.outcome != "scored" else normalise(self.answer)


def read_generations(folder: Path, repair: bool = True) -> list[Generation]:
    """The complete generations of an evaluation; `repair` cuts an incomplete last line off the file."""
    path = folder / GENERATIONS_FILE
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if repair and whole < len(text):
        os.truncate(path, whole)
    return [Generation(**json.loads(line)) for line in text[:whole].split(b"\n") if line]


def append_generations(folder: Path, generations: Iterable[Generation]) -> None:
    """Add generations; they are on the disk when this returns."""
    with (folder / GENERATIONS_FILE).open(
        "a", encoding="utf-8", errors="backslashreplace", newline="\n"
    ) as file:
        file.writelines(json.dumps(asdict(generation)) + "\n" for generation in generations)
        file.flush()
        os.fsync(file.fileno())


def group_keys(extra_info: dict[str, Any]) -> dict[str, str]:
    """The values of a row that results are broken down by."""
    return {key: str(extra_info[key]) for key in GROUPS if extra_info.get(key) not in (None, "")}


def answers_of(generations: Sequence[Generation]) -> dict[int, Answers]:
    """The answers of each prompt, by its number; all of one mode."""
    by_prompt: dict[int, list[Generation]] = {}
    for generation in generations:
        by_prompt.setdefault(generation.index, []).append(generation)
    found = {}
    for index, own in sorted(by_prompt.items()):
        own.sort(key=lambda generation: generation.sample)
        found[index] = Answers(tuple(g.score for g in own), tuple(g.vote for g in own))
    return found


def results(generations: Sequence[Generation], ks: Sequence[int] | None = None) -> dict[str, Any]:
    """Figures by mode, then by data source, level and type; with the outcomes and what was cut off."""
    table: dict[str, Any] = {}
    for mode in ("greedy", "sampled"):
        own = [generation for generation in generations if generation.mode == mode]
        if own:
            table[mode] = {
                "by": {name: _figures(group, ks) for name, group in _grouped(own).items()},
                "outcomes": {
                    outcome: sum(g.outcome == outcome for g in own)
                    for outcome in ("scored", "unparsable", "timeout", "error")
                },
                "truncated": sum(g.finish_reason == "length" for g in own),
                "mean_length": sum(g.length for g in own) / len(own),
                "completions": len(own),
            }
    return table


def _grouped(generations: list[Generation]) -> dict[str, list[Generation]]:
    """By data source, and below it by each level and type."""
    groups: dict[str, list[Generation]] = {}
    for generation in generations:
        source = generation.data_source
        names = [source, *(f"{source} {key}={value}" for key, value in generation.groups.items())]
        for name in names:
            groups.setdefault(name, []).append(generation)
    return dict(sorted(groups.items()))


def _figures(generations: list[Generation], ks: Sequence[int] | None) -> dict[str, float]:
    return summarise(list(answers_of(generations).values()), ks)
