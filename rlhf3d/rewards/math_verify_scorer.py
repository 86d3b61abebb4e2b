r"""MATH answers compared as mathematics by Math-Verify (sympy behind an antlr4 LaTeX grammar).

Invariant: what is handed to Math-Verify is short text with ASCII digits and without control
characters, so hostile completions can cost time (the deadline of the call ends them) but never a
wrong score. Math-Verify is imported at first use.
Runs in: scoring process.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from rlhf3d.data.boxed import last_boxed
from rlhf3d.rewards.math_answer import bases, half_of_day, normalize, split_unit, tidy
from rlhf3d.rewards.score import Outcome, Score

MAX_ANSWER = 500
"""Longest answer taken seriously, in characters (the longest of MATH's 12,500 is about 160)."""
TAIL = 1000
"""Characters at the end of a completion without a box in which `flexible` looks for an answer."""
_RATIONAL = re.compile(
    r"(?P<sign>[-\u2212])?(?:"
    r"(?P<number>(?:[0-9]{1,100}|[0-9]{1,3}(?:,[0-9]{3}){1,9})(?:\.[0-9]{1,100})?)"
    r"|\\frac\{(?P<top>[0-9]{1,100})\}\{(?P<bottom>[0-9]{1,100})\}"
    r"|(?P<over>[0-9]{1,100})/(?P<under>[0-9]{1,100}))"
)
_SEVERAL = re.compile(r"-?[0-9][0-9./]*(?:\s+-?[0-9][0-9./]*)+")
"""Numbers next to each other."""
_ROUNDING = Fraction(1, 10_000)
"""Decimals that differ by a larger share are not one number, rounded; others are compared."""
_DECIMAL_TOLERANCE, _EXACT_TOLERANCE = 5e-6, 1e-50
"""Largest difference of equal numbers, as a share of them: decimals (six digits), exact ones."""
_PRECISION = 60
"""Digits in which exact numbers are compared."""


def score_math(solution_str: str, ground_truth: str, method: str = "flexible") -> Score:
    r"""1.0 where the last `\boxed{…}` equals `ground_truth`, else 0.0.

    Without a box, `flexible` lets Math-Verify find an answer at the end of the text.
    """
    boxed = last_boxed(solution_str)
    if boxed is None:
        if method == "strict":
            return _unparsable(None)
        return _score_unboxed(solution_str[-TAIL:], ground_truth)
    if not boxed or len(boxed) > MAX_ANSWER or not _is_sane(boxed):
        return _unparsable(boxed or None)
    verdict = _quick(boxed, ground_truth)
    if verdict is not None:
        return Score(float(verdict), Outcome.SCORED, {"answer": boxed})
    parsed = _parse(_box(_without_unit(boxed)[0]))
    if not parsed:
        return _unparsable(boxed)
    return Score(_verify(parsed, ground_truth), Outcome.SCORED, {"answer": boxed})


def _score_unboxed(text: str, ground_truth: str) -> Score:
    parsed = _parse(tidy(text)) if _is_sane(text) else ()
    if not parsed:
        return _unparsable(None)
    return Score(_verify(parsed, ground_truth), Outcome.SCORED, {"answer": str(parsed[-1])})


def _verify(parsed: tuple[Any, ...], ground_truth: str) -> float:
    # No deadline of Math-Verify's own, which is a signal: the pool kills what takes too long.
    truth = _parse_truth(ground_truth)
    # The truth first: `verify` is not symmetric, as for an interval and an inequality.
    return float(_grader().verify(truth, list(parsed), timeout_seconds=None))


_TYPICAL = (
    r"\frac{\sqrt{3}}{2}",
    r"2\pi x^2+1",
    r"\left(1,\frac{1}{2}\right]",
    r"\{1,-2\}",
    r"\text{even}",
    "y=2x",
)


def prepare() -> None:
    """Import and warm up Math-Verify, which takes seconds that no answer's deadline should pay."""
    for answer in _TYPICAL:  # the grammar's tables are built as it reads
        score_math(state(answer), "(1,2)")


def state(answer: str) -> str:
    """A completion that states an answer."""
    return _box(answer)


def _unparsable(boxed: str | None) -> Score:
    return Score(0.0, Outcome.UNPARSABLE, {"answer": None if boxed is None else boxed[:MAX_ANSWER]})


def _is_sane(text: str) -> bool:
    """Whether it has no control characters, and no digits except ASCII, which Python reads too."""
    for character in text:
        if not character.isprintable() and character not in "\n\t\r":
            return False
        if character.isdecimal() and not character.isascii():
            return False
    return True


def _quick(answer: str, truth: str) -> bool | None:
    """The verdict where it takes no algebra, else null.

    That is the same text, two numbers, or different bases, units or halves of the day.
    """
    # First of all: the comparisons below may drop a base, a half of the day or a unit.
    if _both_differ(bases(answer), bases(truth)):
        return False
    if _both_differ(half_of_day(answer), half_of_day(truth)):
        return False
    answer, answer_unit = _without_unit(answer)
    truth, truth_unit = _without_unit(truth)
    if _both_differ(answer_unit, truth_unit):
        return False
    if normalize(answer) == normalize(truth):
        return True
    if _SEVERAL.fullmatch(answer):  # Math-Verify would add them up
        return False
    return _compare_numbers(_rational(answer), _rational(truth))


def _both_differ(one: Any, other: Any) -> bool:
    """Whether both are stated, and not the same."""
    return bool(one and other and one != other)


def _compare_numbers(one: Fraction | None, other: Fraction | None) -> bool | None:
    if one is None or other is None:
        return None
    if one == other:
        return True
    # Close ones may be equal as rounded decimals, which Math-Verify decides.
    close = abs(one - other) <= _ROUNDING * max(abs(one), abs(other))
    return None if close else False


def _without_unit(answer: str) -> tuple[str, str | None]:
    """The tidy number, and its unit; odd spellings (1 4/5 cm) are seen only without the unit."""
    number, unit = split_unit(tidy(answer))
    return (tidy(number) if unit else number), unit


def _rational(text: str) -> Fraction | None:
    """An answer that is an integer, a decimal or a plain fraction and nothing else, or null."""
    match = _RATIONAL.fullmatch(text.strip().replace("\\dfrac", "\\frac"))
    if match is None:
        return None
    if match["number"]:
        value = Fraction(match["number"].replace(",", ""))
    else:
        denominator = int(match["bottom"] or match["under"])
        if not denominator:
            return None
        value = Fraction(int(match["top"] or match["over"]), denominator)
    return -value if match["sign"] else value


def _box(answer: str) -> str:
    return f"\\boxed{{{answer.strip().removesuffix('.')}}}"


@lru_cache(maxsize=4096)
def _parse_truth(truth: str) -> list[Any]:
    parsed = _parse(_box(_without_unit(truth)[0]))
    if not parsed:
        raise ValueError(
            f"reward_model.ground_truth: Math-Verify reads nothing in {truth[:200]!r}; fix the row"
        )
    return list(parsed)


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    """What Math-Verify reads in `text`: an expression and its text, or nothing."""
    # A group's completions share their truth, and often their answers: hence the caches. No time
    # limit, as in `_verify`.
    from math_verify import parse

    return tuple(parse(text, extraction_config=_extraction(), parsing_timeout=None))


@cache
def _extraction() -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    for name in ("math_verify", "latex2sympy2_extended"):
        # They log a traceback for every text that they cannot read.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # 0 puts a box before "the final answer is ...", which Math-Verify otherwise looks for first.
    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


@cache
def _grader() -> Any:
    """Math-Verify's grader, in which numbers that are equal must be of equal size as well.

    Its own comparison takes a difference below 1e-15 (of decimals, below 1e-6) for none, so that
    all small numbers were equal.
    """
    from math_verify import grader

    original = grader.sympy_numeric_eq
    arguments = tuple(inspect.signature(original).parameters)
    assert arguments == ("a", "b", "float_rounding", "numeric_precision"), (
        "another Math-Verify: look at sympy_numeric_eq"
    )

    def numeric_eq(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        equal = original(a, b, float_rounding, numeric_precision)
        return bool(equal) and _same_size(a, b, grader.get_pct_val)

    # In the module, where `verify` and the function's own recursion into matrices look it up.
    grader.sympy_numeric_eq = numeric_eq
    return grader


def _same_size(a: Any, b: Any, without_percent: Callable[[Any, Any], Any]) -> bool:
    """Whether expressions that Math-Verify finds equal are so in proportion to their size.

    To 6 digits, and exact ones to 50. False leaves the verdict to algebra.
    """
    if not (_is_number(a) and _is_number(b)):
        if not getattr(a, "free_symbols", None):
            return True  # a matrix, say, whose elements come here themselves
        return bool((a - b).expand() == 0) or _has_decimals(a, b)
    if without_percent(a, a) == without_percent(b, b):  # 9% is 9
        return True
    a, b = a.doit(), b.doit()
    size = max(abs(a.evalf(_PRECISION)), abs(b.evalf(_PRECISION)))
    tolerance = _DECIMAL_TOLERANCE if _has_decimals(a, b) else _EXACT_TOLERANCE
    return bool(abs((a - b).evalf(_PRECISION)) <= tolerance * size)


def _is_number(value: Any) -> bool:
    return bool(getattr(value, "is_number", False))


def _has_decimals(a: Any, b: Any) -> bool:
    from sympy import Float

    return bool(a.has(Float) or b.has(Float))
