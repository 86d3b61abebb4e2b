"""The built-in scorers, and which of them scores which data source.

Invariant: every scorer gives full marks to its own statement of each accepted answer
(`Scorer.statements`), and a data source without a scorer is an error before the run starts. A
scorer's libraries are imported only where it is used.
Runs in: scoring process; the driver asks for statements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf3d.data import sets
from rlhf3d.data.boxed import last_boxed
from rlhf3d.data.rows import NO_SOURCE
from rlhf3d.rewards import gsm8k, math_verify_scorer
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.math_answer import normalize
from rlhf3d.rewards.score import Outcome, Score, ScoreItem
from rlhf3d.rewards.truths import accepted


def _no_preparation() -> None:
    pass


@dataclass(frozen=True)
class Scorer:
    """How one kind of answer is compared."""

    compare: Callable[[str, str, str], Score]
    """(solution_str, accepted answer, reward.method) -> score."""
    state: Callable[[str], str]
    """A completion that states an answer, as the scorer wants it."""
    prepare: Callable[[], None] = _no_preparation
    """Called once a process, before its first sample: slow imports."""

    def score(self, solution_str: str, ground_truth: Any, method: str) -> Score:
        """Compare with each accepted answer: the first score that is right, else the first one.

        ValueError where nothing is right and one of them cannot be compared with.
        """
        scores, errors = [], []
        for answer in accepted(ground_truth):
            try:
                score = self.compare(solution_str, answer, method)
            # Another accepted answer may still be right, and then this one does not matter.
            except ValueError as error:
                errors.append(error)
                continue
            if score.value >= 1.0:
                return score
            scores.append(score)
        if errors:
            raise errors[0]
        return scores[0]

    def statements(self, ground_truth: Any) -> list[str]:
        """Completions that each state one of the accepted answers."""
        return [self.state(answer) for answer in accepted(ground_truth)]


def _state_hashed(answer: str) -> str:
    return f"#### {answer}"


def _score_gsm8k(solution_str: str, ground_truth: str, method: str) -> Score:
    result = gsm8k.compute_score(solution_str, ground_truth, method)
    outcome = Outcome.UNPARSABLE if result.answer is None else Outcome.SCORED
    return Score(result.score, outcome, {"answer": result.answer})


def _score_boxed_exact(solution_str: str, ground_truth: str, method: str) -> Score:
    """The normalized text of the last box, against that of the ground truth."""
    boxed = last_boxed(solution_str)
    if not boxed or len(boxed) > math_verify_scorer.MAX_ANSWER:
        return Score(0.0, Outcome.UNPARSABLE, {"answer": None})
    right = normalize(boxed) == normalize(ground_truth)
    return Score(float(right), Outcome.SCORED, {"answer": boxed})


SCORERS: dict[str, Scorer] = {
    "gsm8k": Scorer(_score_gsm8k, _state_hashed),
    "math_verify": Scorer(
        math_verify_scorer.score_math, math_verify_scorer.state, math_verify_scorer.prepare
    ),
    "boxed_exact": Scorer(_score_boxed_exact, math_verify_scorer.state),
}
DATA_SOURCES: dict[str, str] = sets.scorers()
"""Scorer of each data source; reward.scorers adds to it or changes it."""


def scorer_of(data_source: str, scorers: Mapping[str, str] | None = None) -> Scorer:
    """The scorer of a data source; ValueError where there is none."""
    known = {**DATA_SOURCES, **(scorers or {})}
    name = known.get(data_source)
    if name is None and data_source == NO_SOURCE:
        raise ValueError(
            "reward.weights: no rule scores rows of a file without the column data_source; set "
            "reward.weights={environment: 1.0}, where the environment alone gives rewards, or "
            "custom_reward_function.path, or add the columns data_source and reward_model"
        )
    if name is None:
        raise ValueError(
            f"no built-in scorer for data_source {data_source!r} (known: {', '.join(known)}); "
            f"name one in reward.scorers ({', '.join(SCORERS)}), or set "
            "custom_reward_function.path to score it yourself; where only an environment gives "
            "rewards, set reward.weights={environment: 1.0}"
        )
    if name not in SCORERS:
        raise ValueError(
            f"reward.scorers: no scorer {name!r} for {data_source!r}; "
            f"choose one of {', '.join(SCORERS)}"
        )
    return SCORERS[name]


def check_data_sources(
    data_sources: Iterable[str], scorers: Mapping[str, str] | None = None
) -> None:
    """ValueError for the first data source without a built-in scorer."""
    for data_source in data_sources:
        scorer_of(data_source, scorers)


_OPEN_ANSWER = re.compile(r"(?:\\boxed\s*\{[^{}]*|####\s*)$")
r"""A `\boxed{` or `####` at the prompt's end, which the completion goes on with."""
WITHOUT_TRUTH = (
    "a row has no ground truth (its reward_model is of style model or environment, or not there), "
    "so a rule cannot score it; set reward.weights to {reward_model: 1.0} or {environment: 1.0} "
    "alone, or give it one"
)


@dataclass(frozen=True)
class BuiltinReward(RewardFunction):
    """The scorer registered for each item's data source."""

    method: str = "flexible"
    """reward.method: how answers are found in a completion."""
    data_sources: tuple[str, ...] = ()
    """Those that will come: their scorers are made ready beforehand."""
    scorers: Mapping[str, str] = field(default_factory=dict)
    """reward.scorers."""
    memory_gib: float | None = 3.0
    """What an answer may make sympy allocate before the process is replaced."""

    def __post_init__(self) -> None:
        """ValueError for a method or a scorer that there is not."""
        if self.method not in gsm8k.METHODS:
            raise ValueError(
                f"reward.method: no {self.method!r}; choose one of {', '.join(gsm8k.METHODS)}"
            )
        for data_source, name in self.scorers.items():
            if name not in SCORERS or not data_source:
                raise ValueError(
                    f"reward.scorers: {data_source!r} = {name!r} must be a data source and one of "
                    f"{', '.join(SCORERS)}"
                )

    def prepare(self) -> None:
        """Make the scorers of `data_sources` ready."""
        for data_source in self.data_sources:
            scorer_of(data_source, self.scorers).prepare()

    def score_items(self, items: Sequence[ScoreItem]) -> list[Score]:
        """The score of each item by its data source's scorer; ValueError where one has no truth."""
        return [self._score(item) for item in items]

    def _score(self, item: ScoreItem) -> Score:
        if item.ground_truth is None:
            raise ValueError(WITHOUT_TRUTH)
        scorer = scorer_of(item.data_source, self.scorers)
        # The scorer looks for the marker, which such a completion does not repeat.
        opened = _OPEN_ANSWER.search(item.begun)
        text = opened[0] + item.solution_str if opened else item.solution_str
        return scorer.score(text, item.ground_truth, self.method)
