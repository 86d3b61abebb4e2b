"""What a completion is worth, how its scoring ended, and when too many scores are missing.

Invariant: every completion ends as exactly one `Outcome`; only `scored` and `unparsable` count as
the model's doing, and a share of `error` and `timeout` above reward.max_error_rate stops the run.
Imports nothing heavy: the scoring processes load this module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MODEL_PART = "reward_model"
"""Key of a reward model's score in `Score.extra`."""
_MESSAGE_LINES = 25
"""Lines of one failure's message that fit a screen."""
_FIRST_LINES = 4
"""Of these, those from the beginning, which name the sample; the cause is at the end."""


class Outcome(StrEnum):
    """How the scoring of one completion ended."""

    SCORED = "scored"
    UNPARSABLE = "unparsable"
    """The completion holds no answer; worth 0."""
    TIMEOUT = "timeout"
    ERROR = "error"
    ENV_ERROR = "env_error"
    """The environment failed in every attempt: there is no end that could be scored."""
    ENV_TIMEOUT = "env_timeout"
    OVERLONG_PROMPT = "overlong_prompt"
    """The environment's reset made the prompt too long, and such prompts are left out."""


SCORING = (Outcome.SCORED, Outcome.UNPARSABLE, Outcome.TIMEOUT, Outcome.ERROR)
"""Outcomes of trajectories that came to an end."""


@dataclass(frozen=True)
class Score:
    """Value and outcome of one completion; the answer's part of the value is 0 unless scored."""

    value: float
    outcome: Outcome
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the reward function returned.

    From the built-in scorers `answer`, and `acc` where the value is more than the answer's score;
    from a reward model its score and whether its input was cut (see `reward_model`)."""
    message: str | None = None
    """The sample and the traceback, of an error or timeout, also of the environment."""

    @property
    def accuracy(self) -> float:
        """Whether the answer is right: `acc` of a reward made of several parts, else the value."""
        return float(self.extra.get("acc", self.value))

    @property
    def answer(self) -> str | None:
        """What was read as the answer; None where nothing was, or the reward does not say."""
        answer = self.extra.get("answer")
        return None if answer is None else str(answer)

    @property
    def failed(self) -> bool:
        """Whether the reward function gave no verdict."""
        return self.outcome in (Outcome.TIMEOUT, Outcome.ERROR)

    @property
    def unfinished(self) -> bool:
        """Whether the trajectory came to no end, so that there was nothing to score."""
        return self.outcome not in SCORING

    @property
    def reason(self) -> str:
        """The last line of a failure's message that says something."""
        for line in reversed((self.message or "").splitlines()):
            text = line.strip(" |+-")  # tracebacks of exception groups draw frames
            if text:
                return text[:200]
        return "no message"


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
    """What the prompt's end holds of the answer: the template's opening, the assistant's words."""
    tools: Sequence[Any] = ()
    """JSON schemas of the tools that the prompt offers, for a reward model."""
    conversation: Sequence[dict[str, Any]] = ()
    """All messages of a trajectory with an environment, up to its last turn, which is
    `solution_str` with special tokens."""
    environment: dict[str, Any] = field(default_factory=dict)
    """The environment's own record."""

    @property
    def all_messages(self) -> list[dict[str, Any]]:
        """The conversation, up to the message that is scored."""
        if self.conversation:
            return list(self.conversation)
        messages, begun = list(self.messages), ""
        # A last message of the assistant is what the completion goes on with.
        if messages and messages[-1]["role"] == "assistant":
            begun = messages.pop()["content"]
        return [*messages, {"role": "assistant", "content": begun + self.solution_str}]


class RewardError(RuntimeError):
    """The reward function failed too often, or the scoring processes could not load it."""


def check_outcomes(
    scores: Sequence[Score],
    max_error_rate: float,
    total: int | None = None,
    remedy: str = "Fix the reward function, or raise reward.timeout_s or reward.max_error_rate.",
) -> None:
    """RewardError where more than `max_error_rate` of `total` completions failed.

    `total` is the number of `scores` unless it is given.
    """
    failures = [score for score in scores if score.failed]
    total = len(scores) if total is None else total
    if len(failures) <= max_error_rate * total:
        return
    counts = Counter(score.outcome for score in scores)
    counted = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in SCORING)
    raise RewardError(
        f"{len(failures)} of {total} completions were not scored ({counted}); "
        f"reward.max_error_rate={max_error_rate} allows {math.floor(max_error_rate * total)}. "
        f"The first:\n{one_screen(failures[0].message or 'no message')}\n{remedy}"
    )


def one_screen(message: str) -> str:
    """A long message without its middle."""
    lines = [line[:200] for line in message.splitlines()]
    if len(lines) > _MESSAGE_LINES:
        last = _MESSAGE_LINES - _FIRST_LINES - 1
        lines = [*lines[:_FIRST_LINES], "  ...", *lines[-last:]]
    return "\n".join(lines)
