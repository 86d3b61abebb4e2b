"""Accuracy of n answers a prompt: mean@n, pass@k, maj@k and how far they can be trusted. Pure functions.

Invariant: prompts weigh the same, whatever their answers; pass@k and maj@k of k < n use every answer and are unbiased;
an interval treats the answers to one prompt as one draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Answers:
    """The n answers to one prompt."""

    scores: tuple[float, ...]
    """Of each answer; 1 is right."""
    answers: tuple[Hashable | None, ...] = ()
    """What each one says, in a form equal for equal answers; null where it says nothing."""

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n answers, `right` of which are right, hold a right one (Chen et al., 2021)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k}: k must be between 1 and the {n} answers a prompt")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_score(scores: Sequence[float], answers: Sequence[Hashable | None]) -> float:
    """Mean score of the answer given most often; of equally frequent ones, the mean over them.

    Completions without an answer have no vote; 0 where none has one.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    means = []
    for winner in winners:
        own = [score for score, answer in zip(scores, answers, strict=True) if answer == winner]
        means.append(sum(own) / len(own))
    return sum(means) / len(means)


def maj_at_k(answers: Answers, k: int) -> float:
    """Expected score of the majority of k answers: the mean over the disjoint runs of k of them."""
    n = len(answers.scores)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k}: k must be between 1 and the {n} answers a prompt")
    starts = range(0, n - k + 1, k)
    runs = [(answers.scores[i : i + k], answers.answers[i : i + k]) for i in starts]
    return sum(majority_score(*run) for run in runs) / len(runs)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of one value in [0, 1] a prompt: Wilson's, with the sample size their spread implies.

    For single right-or-wrong answers that is Wilson's interval itself; it does not collapse at 0 or 1.
    """
    count = len(values)
    if not count:
        raise ValueError("an interval needs at least one prompt")
    mean = sum(values) / count
    spread = sum((value - mean) ** 2 for value in values) / count
    size = count * mean * (1 - mean) / spread if spread > 0 else count
    centre = (mean + Z_95**2 / (2 * size)) / (1 + Z_95**2 / size)
    half = (
        Z_95
        / (1 + Z_95**2 / size)
        * math.sqrt(max(0.0, mean * (1 - mean)) / size + (Z_95 / (2 * size)) ** 2)
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def default_ks(n: int) -> list[int]:
    """1, 2, 4, … up to n, and n."""
    return sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})


def summarise(prompts: Sequence[Answers], ks: Sequence[int] | None = None) -> dict[str, float]:
    """`mean@n` with `ci_low` and `ci_high`, `std@n` within a prompt, `pass@k`, `maj@k` (k > 1) of a group of prompts.

    All have the same n. Scores of 1 and above count as right for pass@k.
    """
    sizes = {len(prompt.scores) for prompt in prompts}
    if len(sizes) != 1:
        raise ValueError(f"prompts have {sorted(sizes)} answers: all need the same number")
    (n,) = sizes
    means = [prompt.mean for prompt in prompts]
    low, high = interval([min(1.0, max(0.0, mean)) for mean in means])
    figures = {
        f"mean@{n}": sum(means) / len(means),
        "ci_low": low,
        "ci_high": high,
        "prompts": float(len(prompts)),
    }
    if n == 1:
        return figures
    figures[f"std@{n}"] = sum(map(_std, prompts)) / len(prompts)
    for k in ks or default_ks(n):
        right = [sum(score >= 1.0 for score in prompt.scores) for prompt in prompts]
        figures[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in right) / len(prompts)
        if k > 1 and all(len(prompt.answers) == n for prompt in prompts):
            figures[f"maj@{k}"] = sum(maj_at_k(prompt, k) for prompt in prompts) / len(prompts)
    return figures


def _std(prompt: Answers) -> float:
    return math.sqrt(
        sum((score - prompt.mean) ** 2 for score in prompt.scores) / (len(prompt.scores) - 1)
    )
