"""Scores from the rule's processes, from a reward model, or from both.

Invariant: one score for each item, in order; one that the rule gave no verdict on stays as it is, and what the reward
model said stands in `Score.extra["reward_model"]`, before normalisation and weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rlhf3d.rewards.pool import ScoringPool
from rlhf3d.rewards.scoring import MODEL_PART as PART
from rlhf3d.rewards.scoring import Outcome, Score, ScoreItem


@dataclass(frozen=True)
class ModelScore:
    """What a reward model says of one completion."""

    value: float
    cut: bool = False
    """Whether its input was cut to the model's limit."""


class ScoreModel(Protocol):
    """A reward model."""

    def scores(self, items: Sequence[ScoreItem]) -> list[ModelScore]:
        """One for each item; raises where one is not finite."""


@dataclass(frozen=True)
class ModelPart:
    """How a reward model's score enters the reward: weight x (score - mean) / std."""

    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def add(self, score: Score | None, said: ModelScore) -> Score:
        """`score` of the rule (null: there is none) with the model's part."""
        part = self.weight * (said.value - self.mean) / self.std
        extra = {PART: said.value, f"{PART}_cut": said.cut}
        if score is None:
            return Score(part, Outcome.SCORED, extra)
        if score.failed:
            return score
        return replace(
            score, value=score.value + part, extra={**score.extra, **extra, "acc": score.accuracy}
        )


class ScoringBatch(Protocol):
    """Completions of a batch being scored."""

    def add(self, items: Mapping[int, ScoreItem]) -> None:
        """Give items under their numbers in the batch."""

    def finish(self) -> list[Score]:
        """All scores, in order."""


class Scorer(Protocol):
    """What the loop asks for scores: the rule's processes, or these and a reward model."""

    def start(self, total: int) -> ScoringBatch:
        """A batch of so many items."""


class ModelRewards:
    """A reward model, and the rule's processes where there is a rule too."""

    def __init__(self, pool: ScoringPool | None, model: ScoreModel, part: ModelPart) -> None:
        self._pool, self._model, self._part = pool, model, part

    def start(self, total: int) -> ScoringBatch:
        """A batch of so many items: the rule scores them as they come, the model when all are there."""
        return _ModelBatch(
            self._pool.start(total) if self._pool else None, self._model, self._part, total
        )


class _ModelBatch:
    def __init__(
        self, ruled: ScoringBatch | None, model: ScoreModel, part: ModelPart, total: int
    ) -> None:
        self._ruled, self._model, self._part, self._total = ruled, model, part, total
        self._items: dict[int, ScoreItem] = {}

    def add(self, items: Mapping[int, ScoreItem]) -> None:
        self._items.update(items)
        if self._ruled is not None:
            self._ruled.add({number: replace(item, messages=()) for number, item in items.items()})

    def finish(self) -> list[Score]:
        items = [self._items[number] for number in range(self._total)]
        ruled: Sequence[Score | None] = (
            [None] * self._total if self._ruled is None else self._ruled.finish()
        )
        said = self._model.scores(items)
        return [
            self._part.add(score, model_score)
            for score, model_score in zip(ruled, said, strict=True)
        ]


def only_model(scores: Sequence[Score]) -> bool:
    """Whether the scores are a reward model's alone: there is no right or wrong in them."""
    return bool(scores) and all(
        PART in score.extra and "acc" not in score.extra for score in scores
    )
