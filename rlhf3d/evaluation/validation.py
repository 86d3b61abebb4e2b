"""Held-out figures of a training step, by the same functions as `rlhf3d evaluate`.

Invariant: the accuracy counts right answers alone, whatever else the reward is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf3d.evaluation.metrics import Answers, summarise
from rlhf3d.rewards.math_answer import normalise
from rlhf3d.rewards.scoring import Outcome, Score


def validation_metrics(data_sources: Sequence[str], scores: Sequence[Score], n: int, kind: str) -> dict[str, float]:
    """Figures by data source of n completions a prompt, which stand side by side.

    `val-core/SOURCE/acc/KIND` is the mean; its interval, pass@k, maj@k and std@n are `val-aux/SOURCE/acc/KIND/…`.
    """
    by_source: dict[str, list[Answers]] = {}
    for start in range(0, len(scores), n):
        own = scores[start : start + n]
        answers = Answers(tuple(s.accuracy for s in own), tuple(map(vote, own)))
        by_source.setdefault(data_sources[start], []).append(answers)
    metrics: dict[str, float] = {}
    for source, prompts in by_source.items():
        figures = summarise(prompts)
        metrics[f"val-core/{source}/acc/{kind}"] = figures.pop(f"mean@{n}")
        metrics[f"val-aux/{source}/num_prompts"] = figures.pop("prompts")
        metrics |= {f"val-aux/{source}/acc/{kind}/{name}": value for name, value in figures.items()}
    return metrics


def vote(score: Score) -> str | None:
    """The answer of a completion in the form that is counted for maj@k; null where it has none."""
    answer = score.extra.get("answer")
    return normalise(str(answer)) if score.outcome is Outcome.SCORED and answer is not None else None
