"""gsm8k's rule: the number a completion ends with, compared with the ground truth as a number.

Invariant: linear time and no exception for any completion, however long or strange; numbers are
compared as canonical text, so neither rounding nor Python's limit on digits can interfere.
Runs in: scoring process. Pure.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

METHODS = ("strict", "flexible")

# ASCII digits only. A comma belongs to a number where it groups thousands, so "2, 3" and "2,3" end
# in 3; a minus is a sign only where it cannot be a subtraction or a range ("16-3", "pages 10-12").
_LAST_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].%])[-\u2212]\$?)?"
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)
_HASHED_NUMBER = re.compile(
    r"####\s*\$?(?P<sign>[-\u2212])?\$?(?P<number>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
)


@dataclass(frozen=True)
class ScoreResult:
    """Score of one completion."""

    score: float
    """1.0 where the answer is right, else 0.0."""
    answer: str | None
    """The completion's answer in canonical form (see `canonical`); null where none was found."""


def canonical(sign: str | None, number: str) -> str:
    """The number without commas and padding zeros: ("-", "1,012.50") is -1012.5, ("-", "0") 0."""
    integer, _, fraction = number.replace(",", "").partition(".")
    text = integer.lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    if fraction:
        text = f"{text}.{fraction}"
    return f"-{text}" if sign and text != "0" else text


def extract_answer(text: str, method: str = "flexible") -> str | None:
    """The answer in `text`: its last `#### number` (strict) or its last number (flexible).

    Currency signs, thousands separators, a final period or percent sign are no part of the number.
    Returns the canonical form, or null where there is none; ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"reward.method: no {method!r}; choose one of {', '.join(METHODS)}")
    pattern = _HASHED_NUMBER if method == "strict" else _LAST_NUMBER
    # The last match, without a list of all of them: a completion may be megabytes of digits.
    last = deque(pattern.finditer(text), maxlen=1)
    return canonical(last[0]["sign"], last[0]["number"]) if last else None


def compute_score(solution_str: str, ground_truth: str, method: str = "flexible") -> ScoreResult:
    """1.0 where the answer of `solution_str` equals `ground_truth` as a number, else 0.0.

    The ground truth is a number, perhaps with text around it, or a worked answer that ends with
    `#### number`. ValueError where it holds no number or several (1/2), or the method is unknown.
    """
    # A worked answer holds many numbers, of which only the one after #### is the truth.
    truth = extract_answer(ground_truth, "strict") or _only_number(ground_truth)
    if truth is None:
        raise ValueError(
            f"reward_model.ground_truth: {ground_truth[:80]!r} is not one number, which gsm8k's "
            "scorer compares; fix the row, or name another scorer in reward.scorers"
        )
    answer = extract_answer(solution_str, method)
    return ScoreResult(float(answer == truth), answer)


def _only_number(text: str) -> str | None:
    """The number in `text`, in canonical form; null where it holds none or different ones."""
    numbers = {canonical(found["sign"], found["number"]) for found in _LAST_NUMBER.finditer(text)}
    return numbers.pop() if len(numbers) == 1 else None
