"""What a run wrote, as a page shows it: answers before and after, groups, distributions.

Invariant: answers are the first of their step, not chosen by score, except where they are said to
be (`Pick`); what is left out or cut is counted. Files are read within a budget, since a long run
has more than a page can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from rlhf3d.observability.page.charts import rounded
from rlhf3d.observability.samples import (
    Sample,
    before_after,
    printable,
    read_samples,
    sample_steps,
    samples_path,
    spaced,
)

PAIRS = 8
"""Held-out prompts before and after."""
GROUP_STEPS, GROUPS, GROUP_SIZE = 8, 6, 8
"""Steps whose groups are shown, groups of each, answers of a group."""
CHARACTERS = 900_000
"""Of all texts of a page: with everything else it stays below 3 MB."""
LONGEST = 8_000
"""Characters of one text."""
LONGEST_READ = 80
"""And of what was read as the answer."""
SPREAD_STEPS = 200
"""Steps whose samples are read for distributions."""
SPREAD_BYTES = 300_000_000
"""And how much of them: about three seconds of reading."""
VALUES = 6
"""With at most so many different scores, their shares are shown, else percentiles."""
PERCENTILES = (10, 25, 50, 75, 90)
LOWEST = "the lowest scores"
REWARDED = 50
"""Percent of the best score from which an answer counts as rewarded."""


@dataclass(frozen=True)
class Answer:
    """One completion, for people."""

    text: str
    left_out: int
    """Characters of it that are not shown."""
    mark: str
    """Its score, or why it has none."""
    read: str
    """What the scorer read as the answer; empty where that is not known."""
    worth: int
    """Its score in percent, from the least to the most that there is."""
    length: int
    cut_off: bool


@dataclass(frozen=True)
class Group:
    """A prompt and its completions."""

    prompt: str
    prompt_left_out: int
    truth: str
    answers: Sequence[Answer]
    more: int
    """Answers that are not shown."""
    first: int = 0
    """The place of the first answer among the step's samples."""


@dataclass(frozen=True)
class Pick:
    """Answers of a step that were chosen, each with its prompt."""

    title: str
    groups: Sequence[Group]
    more: int
    """Of them that are not shown."""


@dataclass(frozen=True)
class GroupsOfStep:
    """The first groups of a step, and answers worth a look."""

    step: int
    groups: Sequence[Group]
    more: int
    """Groups that are not shown."""
    picks: Sequence[Pick]


@dataclass(frozen=True)
class Spread:
    """How values are distributed over steps."""

    steps: Sequence[int]
    labels: Sequence[str]
    columns: Sequence[Sequence[float | None]]
    """Of each label its share (`shares`), or that percentile."""
    shares: bool


def prompt_pairs(run: Path, budget: int = CHARACTERS // 4) -> tuple[tuple[int, int], list[Group]]:
    """The same held-out prompts at the first and the last validation: the two steps, and groups of
    two answers; steps 0 and no groups before the second validation.
    """
    before, after = before_after(run, PAIRS)
    if not before:
        return (0, 0), []
    steps = sample_steps(run, "greedy")
    if len(steps) < 2:
        steps = sample_steps(run, "sampled")
    limit = min(LONGEST, budget // (3 * len(before)))
    scale = _Scale.of([*before, *after])
    pairs = [_group([old, new], 0, limit, scale) for old, new in zip(before, after, strict=True)]
    return (steps[0], steps[-1]), pairs


@dataclass(frozen=True)
class _Scale:
    """Which scores are the least and the most."""

    low: float
    high: float

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> _Scale:
        """0 and 1 where all lie between: right and wrong."""
        scores = [float(one.score) for one in samples if math.isfinite(one.score)]
        return cls(min([0.0, *scores]), max([1.0, *scores]))

    def worth(self, sample: Sample) -> int:
        """In percent; 0 where there is no score."""
        if sample.outcome != "scored" or not math.isfinite(sample.score):
            return 0
        return round(100 * (sample.score - self.low) / (self.high - self.low))


def groups_by_step(run: Path, budget: int = CHARACTERS // 2) -> list[GroupsOfStep]:
    """The first groups and some picked answers of a few steps, evenly spaced over the run, first
    and last included.
    """
    steps = spaced(sample_steps(run), GROUP_STEPS)
    found = [(step, read_samples(samples_path(run, step))) for step in steps]
    scale = _Scale.of(chain.from_iterable(samples for _, samples in found))
    # A group is its prompt and its answers; a picked answer comes with its prompt.
    texts = len(found) * (GROUPS * (1 + GROUP_SIZE) + 2 * GROUPS * len(PICKS))
    limit = min(LONGEST, budget // max(texts, 1))
    return [_of_step(step, samples, limit, scale) for step, samples in found]


def _of_step(step: int, samples: Sequence[Sample], limit: int, scale: _Scale) -> GroupsOfStep:
    groups = list(_grouped(samples))
    shown, first = [], 0
    for group in groups[:GROUPS]:
        more = max(0, len(group) - GROUP_SIZE)
        shown.append(_group(group[:GROUP_SIZE], more, limit, scale, first))
        first += len(group)
    picks = []
    for title, choose in PICKS.items():
        picked = choose(samples, scale)
        alone = [_group([sample], 0, limit, scale) for sample in picked[:GROUPS]]
        if alone:
            picks.append(Pick(title, alone, len(picked) - len(alone)))
    return GroupsOfStep(step, shown, len(groups) - len(shown), picks)


def _lowest(samples: Sequence[Sample], scale: _Scale) -> list[Sample]:
    """All below the best of the step, the lowest first."""
    scored = [one for one in samples if one.outcome == "scored" and math.isfinite(one.score)]
    best = max((one.score for one in scored), default=0.0)
    return sorted((one for one in scored if one.score < best), key=lambda one: one.score)


def _rewarded_though_cut_off(samples: Sequence[Sample], scale: _Scale) -> list[Sample]:
    cut_off = [one for one in samples if one.finish_reason == "length"]
    return [one for one in cut_off if scale.worth(one) >= REWARDED]


def _without_score(samples: Sequence[Sample], scale: _Scale) -> list[Sample]:
    return [one for one in samples if one.outcome != "scored"]


def _longest(samples: Sequence[Sample], scale: _Scale) -> list[Sample]:
    return sorted(samples, key=lambda one: -one.length)


PICKS: dict[str, Callable[[Sequence[Sample], _Scale], list[Sample]]] = {
    LOWEST: _lowest,
    "rewarded, though cut off": _rewarded_though_cut_off,
    "without a score": _without_score,
    "the longest": _longest,
}
"""By what answers of a step are chosen."""


def _grouped(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Completions of a prompt follow one another."""
    for _, group in groupby(samples, key=lambda sample: (sample.prompt, sample.ground_truth)):
        yield list(group)


def _group(
    samples: Sequence[Sample], more: int, limit: int, scale: _Scale, place: int = 0
) -> Group:
    first = samples[0]
    prompt, prompt_left_out = shortened(first.prompt, limit)
    answers = [_answer(sample, limit, scale) for sample in samples]
    truth = first.ground_truth[:limit]
    return Group(prompt, prompt_left_out, truth, answers, more, place)


def _answer(sample: Sample, limit: int, scale: _Scale) -> Answer:
    text, left_out = shortened(sample.transcript, limit)
    read, cut_off = printable(sample.answer or "", LONGEST_READ), sample.finish_reason == "length"
    return Answer(text, left_out, sample.mark, read, scale.worth(sample), sample.length, cut_off)


def shortened(text: str, limit: int) -> tuple[str, int]:
    """The start of a text, and how many characters were left out."""
    return text[:limit], max(0, len(text) - limit)


def spreads(run: Path) -> dict[str, Spread]:
    """Distributions of `score` and `length` over steps; empty without samples."""
    steps = sample_steps(run)
    if not steps:
        return {}
    chosen = spaced(steps, min(SPREAD_STEPS, _affordable(run, steps)))
    found = [(step, read_samples(samples_path(run, step))) for step in chosen]
    found = [(step, samples) for step, samples in found if samples]
    if not found:
        return {}
    chosen = [step for step, _ in found]
    scores = [_column(samples, "score") for _, samples in found]
    lengths = [_column(samples, "length") for _, samples in found]
    return {"score": _spread(chosen, scores), "length": _percentiles(chosen, lengths)}


def _column(samples: Sequence[Sample], name: str) -> np.ndarray:
    return np.array([float(getattr(sample, name)) for sample in samples])


def _affordable(run: Path, steps: Sequence[int]) -> int:
    """How many files can be read; their sizes are those of a few."""
    sizes = [samples_path(run, step).stat().st_size for step in spaced(steps, 5)]
    return max(2, int(SPREAD_BYTES / max(1.0, sum(sizes) / len(sizes))))


def _spread(steps: Sequence[int], columns: Sequence[np.ndarray]) -> Spread:
    everything = np.concatenate(columns)
    kinds = np.unique(everything[np.isfinite(everything)])
    if not 0 < len(kinds) <= VALUES:
        return _percentiles(steps, columns)
    labels = [f"score {kind:g}" for kind in kinds]
    return Spread(steps, labels, [_shares(columns, kind) for kind in kinds], True)


def _shares(columns: Sequence[np.ndarray], kind: float) -> list[float | None]:
    """Of each step, the share of completions with that score."""
    return rounded(float((column == kind).mean()) for column in columns)


def _percentiles(steps: Sequence[int], columns: Sequence[np.ndarray]) -> Spread:
    columns = [column[np.isfinite(column)] for column in columns]
    unknown = np.full(len(PERCENTILES), np.nan)
    of_steps = [np.percentile(c, PERCENTILES) if len(c) else unknown for c in columns]
    labels = [f"p{share}" for share in PERCENTILES]
    return Spread(steps, labels, [rounded(column) for column in np.array(of_steps).T], False)
