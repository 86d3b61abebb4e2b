"""Held-out figures of a training step, by the same functions as `rlhf3d evaluate`.

Invariant: the accuracy counts right answers alone, whatever else the reward is made of; where a reward model alone
scores, nothing is right or wrong and there is no accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from rlhf3d.evaluation.metrics import Answers, summarise
from rlhf3d.rewards.math_answer import normalise
from rlhf3d.rewards.reward_model import PART, only_model
from rlhf3d.rewards.score import Outcome, Score


def validation_metrics(
    data_sources: Sequence[str], scores: Sequence[Score], n: int, kind: str
) -> dict[str, float]:
    """Figures by data source of n completions a prompt, which stand side by side.

    `val-core/SOURCE/acc/KIND` is the mean; its interval, pass@k, maj@k and std@n are `val-aux/SOURCE/acc/KIND/…`. Of a
    reward model `val-core/SOURCE/reward_model/KIND` is the mean score, `val-aux/SOURCE/reward_model/KIND/se` its
    standard error over prompts.
    """
    metrics = _reward_model_metrics(data_sources, scores, n, kind)
    if only_model(scores):
        return metrics
    by_source: dict[str, list[Answers]] = {}
    for start in range(0, len(scores), n):
        own = scores[start : start + n]
        answers = Answers(tuple(s.accuracy for s in own), tuple(map(vote, own)))
        by_source.setdefault(data_sources[start], []).append(answers)
    for source, prompts in by_source.items():
        figures = summarise(prompts)
        metrics[f"val-core/{source}/acc/{kind}"] = figures.pop(f"mean@{n}")
        metrics[f"val-aux/{source}/num_prompts"] = figures.pop("prompts")
        metrics |= {f"val-aux/{source}/acc/{kind}/{name}": value for name, value in figures.items()}
    return metrics


def _reward_model_metrics(
    data_sources: Sequence[str], scores: Sequence[Score], n: int, kind: str
) -> dict[str, float]:
    means: dict[str, list[float]] = {}
    for start in range(0, len(scores), n):
        said = [s.extra[PART] for s in scores[start : start + n] if PART in s.extra]
        if said:
            means.setdefault(data_sources[start], []).append(fmean(said))
    metrics: dict[str, float] = {}
    for source, of_prompts in means.items():
        metrics[f"val-core/{source}/{PART}/{kind}"] = fmean(of_prompts)
        metrics[f"val-aux/{source}/{PART}/{kind}/se"] = (
            stdev(of_prompts) / sqrt(len(of_prompts)) if len(of_prompts) > 1 else 0.0
        )
        metrics[f"val-aux/{source}/num_prompts"] = float(len(of_prompts))
    return metrics


def vote(score: Score) -> str | None:
    """The answer of a completion in the form that is counted for maj@k; null where it has none."""
    answer = score.extra.get("answer")
    return (
        normalise(str(answer)) if score.outcome is Outcome.SCORED and answer is not None else None
    )
