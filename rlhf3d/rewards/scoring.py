"""What a score is, what may come out of scoring, and when too many are missing.

Invariant: every completion ends as exactly one `Outcome`; only `scored` and `unparsable` count as the
model's doing, and a share of `error` and `timeout` above reward.max_error_rate stops the run.
Imports nothing heavy: the scoring processes load this module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any, Protocol

ExtraInfo = dict[str, Any] | None
_MESSAGE_LINES = 25
"""Lines of one failure's message that fit a screen."""
MODEL_PART = "reward_model"
"""Key of a reward model's score in `Score.extra`."""
_LARGEST = 3.4028234663852886e38
"""Of 32-bit floats, in which rewards are computed."""
_LONGEST_TEXT, _MOST, _DEEPEST = 2000, 100, 3
"""Characters, entries and levels that are kept of what a reward function returns beside its score."""


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


class WrongCount(ValueError):
    """A call for several completions returned no score for each: none of what it returned belongs to one of them."""


class RewardFunction(Protocol):
    """What scores one completion: returns a number, a dict with `score`, or a `Score`.

    It may also have `score_items(items)`, which scores several in one call and returns as many results; `chunk_size`,
    how many it wants at most; `prepare()`, called once in each scoring process; `memory_gib`, what one may use;
    `open_end(begun)`, what of the prompt's end it reads before the completion.
    """

    def __call__(
        self,
        *,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: ExtraInfo = None,
    ) -> Any:
        """Score of `solution_str`."""


def to_score(result: Any) -> Score:
    """A reward function's return value as a `Score` of plain values, which any process can read.

    ValueError where `score`, or `acc` beside it, is not a finite number. Of what else it returned, numbers keep their
    value, containers their first entries, and all other objects become text.
    """
    if isinstance(result, Score):
        return result
    if not isinstance(result, dict):
        return Score(_finite(result, "the reward function returned"), Outcome.SCORED)
    if "score" not in result:
        raise ValueError(f"the reward function returned no 'score' but {sorted(map(str, result))}")
    number = _finite(result["score"], "the reward function returned score =")
    extra = {_key(key): _plain(item) for key, item in result.items() if key not in ("score", "acc")}
    if "acc" in result:
        extra["acc"] = _finite(result["acc"], "the reward function returned acc =")
    return Score(number, Outcome.SCORED, extra)


def _finite(value: Any, what: str) -> float:
    """A number, also of numpy or torch, that 32 bits can hold."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{what} {type(value).__name__} {str(value)[:80]!r}, not a finite number")
    return number


def _key(key: Any) -> str:
    """A key as text, and not one of those that a reward model's part has."""
    name = str(key)[:_LONGEST_TEXT]
    return f"returned_{name}" if name.startswith(MODEL_PART) else name


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` made of None, booleans, numbers, text, lists and dicts alone, cut to a size that is quick to send."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, bool | int | float):  # a class of the user's own
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, str):
        return str.__str__(value)[:_LONGEST_TEXT]
    if (
        hasattr(value, "tolist") and math.prod(getattr(value, "shape", (_MOST + 1,))) <= _MOST
    ):  # numpy's, torch's
        return _plain(value.tolist(), depth)
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {_key(key): _plain(item, depth + 1) for key, item in islice(value.items(), _MOST)}
    if isinstance(value, list | tuple | set | frozenset) and depth < _DEEPEST:
        return [_plain(item, depth + 1) for item in islice(value, _MOST)]
    return _shown(value)


def _shown(value: Any) -> str:
    try:
        return str.__str__(repr(value))[:_LONGEST_TEXT]
    except Exception:  # of a class of the user's own
        return f"<{type(value).__name__}>"


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
