"""What a score is, what may come out of scoring, and when too many are missing.

Invariant: every completion ends as exactly one `Outcome`; only `scored` and `unparsable` count as the
model's doing, and a share of `error` and `timeout` above reward.max_error_rate stops the run.
Imports nothing heavy: the scoring processes load this module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

ExtraInfo = dict[str, Any] | None
_MESSAGE_LINES = 25
"""Lines of one failure's message that fit a screen."""
MODEL_PART = "reward_model"
"""Key of a reward model's score in `Score.extra`."""


class Outcome(StrEnum):
    """How the scoring of one completion ended."""

    SCORED = "scored"
    UNPARSABLE = "unparsable"
    """The completion holds no answer; worth 0."""
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Score:
    """Value and outcome of one completion; the answer's part of the value is 0 unless scored."""

    value: float
    outcome: Outcome
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the reward function returned; from the built-in scorers `answer`, and `acc` where value holds more.
    From a reward model its score and whether its input was cut (see `combined`)."""
    message: str | None = None
    """The sample and the traceback, of an error or timeout."""

    @property
    def accuracy(self) -> float:
        """Whether the answer is right: `acc` of a reward made of several parts, else the value."""
        return float(self.extra.get("acc", self.value))

    @property
    def failed(self) -> bool:
        """Whether the reward function gave no verdict."""
        return self.outcome in (Outcome.TIMEOUT, Outcome.ERROR)

    @property
    def reason(self) -> str:
        """The last line of a failure's message that says something; groups of exceptions draw frames."""
        lines = [line.strip(" |+-") for line in (self.message or "").splitlines()]
        return next((line[:200] for line in reversed(lines) if line), "no message")


@dataclass(frozen=True)
class ScoreItem:
    """One completion to score."""

    data_source: str
    solution_str: str
    """Text of the completion, without the prompt."""
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)
    messages: Sequence[dict[str, Any]] = ()
    """The prompt, for a reward model."""
    begun: str = ""
    """What the prompt's end holds of the answer: the template's opening, the assistant's own last words."""


class RewardError(RuntimeError):
    """The reward function failed too often, or could not be loaded by the scoring processes."""


def check_outcomes(
    scores: Sequence[Score],
    max_error_rate: float,
    total: int | None = None,
    remedy: str = "Fix the reward function, or raise reward.timeout_s or reward.max_error_rate.",
) -> None:
    """RewardError where more than `max_error_rate` of `total` completions (null: of `scores`) failed."""
    failures = [score for score in scores if score.failed]
    total = len(scores) if total is None else total
    if len(failures) <= max_error_rate * total:
        return
    counts = Counter(score.outcome.value for score in scores)
    counted = ", ".join(f"{counts[outcome.value]} {outcome.value}" for outcome in Outcome)
    raise RewardError(
        f"{len(failures)} of {total} completions were not scored ({counted}); reward.max_error_rate="
        f"{max_error_rate} allows {math.floor(max_error_rate * total)}. The first:\n"
        f"{_one_screen(failures[0].message or 'no message')}\n"
        f"{remedy}"
    )


def _one_screen(message: str) -> str:
    lines = [line[:200] for line in message.splitlines()]
    if len(lines) <= _MESSAGE_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:4], "  ...", *lines[5 - _MESSAGE_LINES :]])
