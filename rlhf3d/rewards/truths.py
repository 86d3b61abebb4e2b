"""Ground truths as text: what a built-in scorer compares with, and what people are shown.

Invariant: a number keeps its value whatever its type (1e20 is 100000000000000000000, 3.0 is 3), a
list is the answers that are accepted, and what a rule cannot compare with is a ValueError, never a
text that no answer equals.
"""

from __future__ import annotations

import ast
import json
import math
import re
from decimal import Decimal
from typing import Any

_NUMBER_IN_BRACKETS = re.compile(r"\[\s*-?[0-9.]+\s*\]")
_QUOTES_WITHOUT_COMMA = re.compile(r"['\"]\s+['\"]")


def accepted(ground_truth: Any) -> list[str]:
    """The answers that count as right: one, or the entries of a list or of its JSON or Python text.

    ValueError for an empty list, for what is not finite, and for a struct.
    """
    entries = _list_in(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(entries, list | tuple):
        return [_answer(ground_truth)]
    if not entries:
        raise ValueError(
            "reward_model.ground_truth: the list of accepted answers is empty; fix the row"
        )
    return [_answer(entry) for entry in entries]


def shown(value: Any) -> str:
    """A ground truth of any type for people, samples and reports; empty for none."""
    if value is None:
        return ""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return _number(value) if isinstance(value, float | Decimal) else str(value)


def _list_in(text: str) -> Any:
    """The list that `text` writes out, or null.

    [1, 2] is an interval, ["1", "2"] are two answers, and so is ["1", 2].
    """
    stripped = text.strip()
    if _NUMBER_IN_BRACKETS.fullmatch(stripped):  # one number is no interval
        return [stripped[1:-1].strip()]
    in_brackets = stripped.startswith(("[", "(")) and stripped.endswith(("]", ")"))
    if not in_brackets or stripped[1:].lstrip()[:1] not in ("'", '"'):
        return None
    if _QUOTES_WITHOUT_COMMA.search(stripped):
        raise ValueError(
            f"reward_model.ground_truth: {text[:80]!r} looks like a printed numpy array; write the "
            "answers as a list"
        )
    # Python's text has single quotes, which JSON does not read. `literal_eval` runs no code.
    for read in (json.loads, ast.literal_eval):
        try:
            entries = read(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(entries, list | tuple):
            return entries
    return None


def _answer(value: Any) -> str:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("reward_model.ground_truth: an accepted answer is empty; fix the row")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(
            "reward_model.ground_truth: a built-in scorer compares text, numbers and lists of them,"
            f" not {type(value).__name__} {str(value)[:80]!r}; write it as text, or set "
            "custom_reward_function.path"
        )
    if not math.isfinite(value):
        raise ValueError(f"reward_model.ground_truth: {value} is no answer; fix the row")
    return _number(value)


def _number(value: int | float | Decimal) -> str:
    """Digits without an exponent or padding zeros."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    # Through the shortest text: Decimal(0.1) itself has 55 digits.
    text = format(Decimal(str(value)), "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".") or "0"
    return text
