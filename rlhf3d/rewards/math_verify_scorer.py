r"""MATH answers compared as mathematics by Math-Verify (sympy behind an antlr4 LaTeX grammar).

Invariant: what is handed to Math-Verify is short ASCII-digit text without control characters, so hostile completions
can cost time (the scoring pool's deadline ends them) but never a wrong score. Math-Verify is imported at first use.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from rlhf3d.rewards.math_answer import bases, half_of_day, last_boxed, normalise, split_unit, tidy
from rlhf3d.rewards.score import Outcome, Score

MAX_ANSWER = 500
"""Longest answer taken seriously, characters (the longest of MATH's 12,500 is about 160)."""
TAIL = 1000
"""Characters at the end of a completion without a box in which the flexible method looks for an answer."""
_RATIONAL = re.compile(
    r"(?P<sign>[-\u2212])?(?:(?P<number>(?:[0-9]{1,100}|[0-9]{1,3}(?:,[0-9]{3}){1,9})(?:\.[0-9]{1,100})?)"
    r"|\\frac\{(?P<top>[0-9]{1,100})\}\{(?P<bottom>[0-9]{1,100})\}|(?P<over>[0-9]{1,100})/(?P<under>[0-9]{1,100}))"
)
_SEVERAL = re.compile(r"-?[0-9][0-9./]*(?:\s+-?[0-9][0-9./]*)+")
"""Numbers side by side."""
_CLOSE = Fraction(1, 10_000)
"""Decimals that differ by more than this share are not the same number rounded; nearer ones Math-Verify compares."""

_DECIMAL_DIGITS, _EXACT_DIGITS = 5e-6, 1e-50
"""Largest difference of equal numbers, as a share of them: with decimals (six digits), and of exact ones."""


def score_math(solution_str: str, ground_truth: str, method: str = "flexible") -> Score:
    r"""1.0 where the last `\boxed{…}` equals `ground_truth`, else 0.0.

    Without a box, `flexible` lets Math-Verify find an answer at the end of the text; `strict` does not.
    """
    boxed = last_boxed(solution_str)
    if boxed == "" or (boxed is None and method == "strict"):
        return _unparsable(None)
    answer = solution_str[-TAIL:] if boxed is None else boxed
    if len(answer) > max(MAX_ANSWER, TAIL if boxed is None else 0) or not _is_sane(answer):
        return _unparsable(boxed)
    if boxed is not None and (quick := _quick(boxed, ground_truth)) is not None:
        return Score(float(quick), Outcome.SCORED, {"answer": boxed})
    found = _parse(_box(_without_unit(answer)[0]) if boxed is not None else tidy(answer))
    if not found:
        return _unparsable(boxed)
    gold = _parse_truth(ground_truth)
    right = _grader().verify(gold, list(found), timeout_seconds=None)
    return Score(
        float(right), Outcome.SCORED, {"answer": boxed if boxed is not None else str(found[-1])}
    )


def prepare() -> None:
    """Import and warm up Math-Verify, which takes seconds that no answer's deadline should pay."""
    for text in _TYPICAL:  # the grammar's tables are built as it reads
        score_math(f"\\boxed{{{text}}}", "(1,2)")


_TYPICAL = (
    r"\frac{\sqrt{3}}{2}",
    r"2\pi x^2+1",
    r"\left(1,\frac{1}{2}\right]",
    r"\{1,-2\}",
    r"\text{even}",
    "y=2x",
)


def state(answer: str) -> str:
    """A completion that states an answer."""
    return _box(answer)


def _unparsable(boxed: str | None) -> Score:
    return Score(0.0, Outcome.UNPARSABLE, {"answer": None if boxed is None else boxed[:MAX_ANSWER]})


def _is_sane(text: str) -> bool:
    """Whether it has only ASCII digits (Python reads others as numbers too) and no control characters."""
    return all(c.isprintable() or c in "\n\t\r" for c in text) and not any(
        c.isdecimal() for c in text if not c.isascii()
    )


def _quick(answer: str, truth: str) -> bool | None:
    """The verdict where it needs no algebra: the same text, two numbers, or other bases, units or halves of the day."""
    stated = bases(answer), bases(truth)
    if all(stated) and stated[0] != stated[1]:
        return False
    halves = half_of_day(answer), half_of_day(truth)
    if all(halves) and halves[0] != halves[1]:
        return False
    (answer, unit), (truth, wanted) = _without_unit(answer), _without_unit(truth)
    if unit and wanted and unit != wanted:
        return False
    if normalise(answer) == normalise(truth):
        return True
    if _SEVERAL.fullmatch(answer):  # Math-Verify would add them up
        return False
    one, other = _rational(answer), _rational(truth)
    if one is None or other is None:
        return None
    if one == other:
        return True
    return None if abs(one - other) <= _CLOSE * max(abs(one), abs(other)) else False


def _without_unit(answer: str) -> tuple[str, str | None]:
    """The tidy number, and its unit; what is spelled oddly (1 4/5 cm) is seen only when the unit is off."""
    number, unit = split_unit(tidy(answer))
    return (tidy(number) if unit else number), unit


def _rational(text: str) -> Fraction | None:
    """An answer as a number, where it is a whole number, a decimal or a plain fraction and nothing besides."""
    match = _RATIONAL.fullmatch(text.strip().replace("\\dfrac", "\\frac"))
    if match is None:
        return None
    if match["number"]:
        value = Fraction(match["number"].replace(",", ""))
    else:
        bottom = int(match["bottom"] or match["under"])
        if not bottom:
            return None
        value = Fraction(int(match["top"] or match["over"]), bottom)
    return -value if match["sign"] else value


def _box(answer: str) -> str:
    return f"\\boxed{{{answer.strip().removesuffix('.')}}}"


@lru_cache(maxsize=4096)
def _parse_truth(truth: str) -> list[Any]:
    gold = _parse(_box(_without_unit(truth)[0]))
    if not gold:
        raise ValueError(
            f"reward_model.ground_truth: Math-Verify reads nothing in {truth[:200]!r}; fix the row"
        )
    return list(gold)


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    """What Math-Verify reads in `text`: an expression and its text, or nothing. No deadline: the pool has one."""
    from math_verify import parse

    return tuple(parse(text, extraction_config=_extraction(), parsing_timeout=None))


@cache
def _grader() -> Any:
    """Math-Verify's grader, in which two numbers that are equal to some decimals must be of equal size as well.

    It takes a difference below 1e-15 for none (and of decimals, below 1e-6): all small numbers were one.
    """
    from math_verify import grader

    theirs = grader.sympy_numeric_eq

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        return bool(theirs(a, b, float_rounding, numeric_precision)) and _same_size(
            a, b, grader.get_pct_val
        )

    assert tuple(inspect.signature(theirs).parameters) == (
        "a",
        "b",
        "float_rounding",
        "numeric_precision",
    )
    grader.sympy_numeric_eq = numeric_eq
    return grader


def _same_size(a: Any, b: Any, without_percent: Callable[[Any, Any], Any]) -> bool:
    """Whether two expressions equal to some decimals are equal in proportion: to 6 digits, or where exact, to 60.

    False leaves the verdict to algebra.
    """
    if not all(
        getattr(value, "is_number", False) for value in (a, b)
    ):  # matrices come again by element
        return (
            not hasattr(a, "free_symbols")
            or not a.free_symbols
            or (a - b).expand() == 0
            or _has_decimals(a, b)
        )
    if without_percent(a, a) == without_percent(b, b):  # 9% is 9
        return True
    a, b = a.doit(), b.doit()
    size = max(abs(a.evalf(60)), abs(b.evalf(60)))
    share = _DECIMAL_DIGITS if _has_decimals(a, b) else _EXACT_DIGITS
    return bool(abs((a - b).evalf(60)) <= share * size)


def _has_decimals(a: Any, b: Any) -> bool:
    from sympy import Float

    return bool(a.has(Float) or b.has(Float))


@cache
def _extraction() -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(
            logging.CRITICAL
        )  # it logs a traceback for every text it cannot read
    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
