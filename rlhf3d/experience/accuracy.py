"""Accuracy of n answers per prompt: mean@n, pass@k, maj@k and their uncertainty.

Invariant: prompts weigh the same, whatever their answers; pass@k and maj@k of k < n use every
answer and are unbiased; an interval treats the answers to one prompt as one draw. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rlhf3d.rewards.math_answer import normalize
from rlhf3d.rewards.score import Outcome

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True)
class Answers:
    """The n answers to one prompt."""

    scores: tuple[float, ...]
    """Of each answer; 1 is right."""
    answers: tuple[Hashable | None, ...] = ()
    """Each one's vote, see `vote`."""

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the probability that k of n answers hold one of the `right` right ones.

    Chen et al., 2021 (arXiv 2107.03374), eq. 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k}: k must be between 1 and the {n} answers a prompt")
    # The share of the sets of k without a right one; comb is 0 where fewer than k are wrong.
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_score(scores: Sequence[float], answers: Sequence[Hashable | None]) -> float:
    """Return the score of the answer given most often; of equally frequent ones, their mean.

    Completions without an answer have no vote; 0 where none has one.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    means = []
    for winner in winners:
        pairs = zip(scores, answers, strict=True)
        of_winner = [score for score, answer in pairs if answer == winner]
        means.append(sum(of_winner) / len(of_winner))
    return sum(means) / len(means)


def maj_at_k(answers: Answers, k: int) -> float:
    """Return the expected score of the majority of k answers: the mean over disjoint sets of k."""
    n = len(answers.scores)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k}: k must be between 1 and the {n} answers a prompt")
    # A rest of fewer than k answers is left out: its majority would be one of fewer votes.
    starts = range(0, n - k + 1, k)
    total = 0.0
    for start in starts:
        chosen = slice(start, start + k)
        total += majority_score(answers.scores[chosen], answers.answers[chosen])
    return total / len(starts)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of one value in [0, 1] per prompt.

    It is Wilson's, with the sample size that the values' spread implies. For single right-or-wrong
    answers that is Wilson's interval itself; it does not collapse at 0 or 1.
    """
    count = len(values)
    if not count:
        raise ValueError("an interval needs at least one prompt")
    mean = sum(values) / count
    spread = sum((value - mean) ** 2 for value in values) / count
    # The number of right-or-wrong answers whose mean would vary as much.
    size = count * mean * (1 - mean) / spread if spread > 0 else count
    center = (mean + Z_95**2 / (2 * size)) / (1 + Z_95**2 / size)
    variance = max(0.0, mean * (1 - mean)) / size + (Z_95 / (2 * size)) ** 2
    half = Z_95 / (1 + Z_95**2 / size) * math.sqrt(variance)
    return max(0.0, center - half), min(1.0, center + half)


def default_ks(n: int) -> list[int]:
    """Return 1, 2, 4, … up to n, and n."""
    powers = {2**i for i in range(n.bit_length())}
    return sorted(powers | {n})


def summarize(prompts: Sequence[Answers], ks: Sequence[int] | None = None) -> dict[str, float]:
    """Summarize prompts: `mean@n`, `ci_low`, `ci_high`, `std@n`, `pass@k` and `maj@k` (k > 1).

    `std@n` is within a prompt. All prompts have the same n. Scores of 1 and above count as right
    for pass@k.
    """
    sizes = {len(prompt.scores) for prompt in prompts}
    if len(sizes) != 1:
        raise ValueError(f"prompts have {sorted(sizes)} answers: all need the same number")
    (n,) = sizes
    means = [prompt.mean for prompt in prompts]
    # A user's scores may lie outside [0, 1]; Wilson's interval is one of shares.
    low, high = interval([min(1.0, max(0.0, mean)) for mean in means])
    figures = {
        f"mean@{n}": sum(means) / len(means),
        "ci_low": low,
        "ci_high": high,
        "prompts": float(len(prompts)),
    }
    # One answer has no spread, and pass@1 would repeat the mean.
    if n == 1:
        return figures
    figures[f"std@{n}"] = sum(map(_std, prompts)) / len(prompts)
    right = [_num_right(prompt) for prompt in prompts]
    for k in ks or default_ks(n):
        figures[f"pass@{k}"] = sum(pass_at_k(n, c, k) for c in right) / len(prompts)
        if k > 1 and all(len(prompt.answers) == n for prompt in prompts):
            figures[f"maj@{k}"] = sum(maj_at_k(prompt, k) for prompt in prompts) / len(prompts)
    return figures


def _num_right(prompt: Answers) -> int:
    """Completions with full score."""
    return sum(score >= 1.0 for score in prompt.scores)


def vote(answer: object, outcome: str) -> str | None:
    """Return the answer in the form that is counted for maj@k: equal for equal answers.

    None where the scorer read none (`outcome` is not `scored`, see `Outcome`).
    """
    if answer is None or outcome != Outcome.SCORED:
        return None
    return normalize(str(answer))


def _std(prompt: Answers) -> float:
    # Called for n > 1 only, so n - 1 divides.
    squares = sum((score - prompt.mean) ** 2 for score in prompt.scores)
    return math.sqrt(squares / (len(prompt.scores) - 1))
