r"""MATH answers: the last box, the table of equivalent answers, and a corpus of hostile ones."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.rewards import math_verify_scorer as scorer
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.math_answer import bases, half_of_day, last_boxed, normalize, split_unit, tidy
from rlhf3d.rewards.math_verify_scorer import score_math
from rlhf3d.rewards.score import Outcome, ScoreItem
from rlhf3d.rewards.scorers import BuiltinReward

MATH_500_EXCERPT = Path(__file__).parents[2] / "data" / "math500_excerpt.jsonl"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{4}$.", "4"),
        (r"\boxed{3} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{1\}} and {", r"\{1\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5$ or", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed", None),
        ("boxed{4}", None),
        ("", None),
    ],
)
def test_last_box(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"1/2", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"10{,}000", "10,000"),
        (r"11,\! 111", "11111"),
        (r"5 \text{ cm}", "5"),
        (r"5 \text{ cm}^2", "5"),
        (r"\text{even}", "even"),
        (r"90^\circ", "90"),
        (r"\$5.", "5"),
        ("x = 5", "5"),
        (".5", "0.5"),
        (r"\sqrt3", r"\sqrt{3}"),
    ],
)
def test_normal_form(one: str, other: str) -> None:
    assert normalize(one) == normalize(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("3 4", "34"), ("1, 234", "1234"), (r"\text{even}", r"\text{odd}"), ("(1,2)", "[1,2]")],
)
def test_normal_form_keeps_what_differs_apart(one: str, other: str) -> None:
    assert normalize(one) != normalize(other)


RIGHT = [
    # fractions, decimals, percent
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    (r"\frac{1}{2}", r"50\%"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
    ("1000", "1,000"),
    (r"10,\!000", "10000"),
    (r"1.5\times 10^3", "1500"),
    (r"\frac{\pi}{2}", "1.5707963"),
    ("4", "4.0"),
    ("4", "4."),
    ("4", "+4"),
    # sets, intervals, tuples
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    ("1,-2", "-2, 1"),
    (r"\pm 2", "2,-2"),
    (r"x=1 \text{ or } x=-2", "1,-2"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    ("[1,2)", "[1, 2)"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    # units
    (r"5\text{ cm}", "5"),
    ("5", r"5 \mathrm{ cm}"),
    (r"90^\circ", "90"),
    (r"\$5", "5"),
    # matrices
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\begin{pmatrix}1/2\\3\end{pmatrix}", r"\begin{pmatrix}0.5\\3\end{pmatrix}"),
    # expressions, words
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("y=x+1", "x+1"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\binom{5}{2}", "10"),
    ("3+2i", "2i+3"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(A)}", "A"),
    # other spellings of the same
    ("90", "90°"),
    ("90", r"90\degree"),
    ("90", r"90^{\circ}"),
    ("(1,2)", r"\bigl(1,2\bigr)"),
    (r"(-\infty,2)\cup(3,\infty)", r"\Big(-\infty,2\Big)\cup\biggl(3,\infty\biggr)"),
    (r"\emptyset", r"\varnothing"),
    (r"\varnothing", "∅"),
    ("42", r"\boldsymbol{42}"),
    (r"\frac{1}{2}", r"\boldsymbol{\frac{1}{2}}"),
    ("42", r"\bm{42}"),
    (r"\frac{9}{5}", "1 4/5"),
    ("1 4/5", "1.8"),
    (r"-\frac{9}{5}", r"-1\ 4/5"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"\frac{1}{6}", r"0.1\bar{6}"),
    (r"\frac{1}{6}", r"0.1\overline6"),
    (r"2\sqrt{2}", "2√2"),
    (r"\sqrt[3]{2}", r"\sqrt[3]2"),
    ("0.5", r"\nicefrac{1}{2}"),
    ("3", r"\color{red}{3}"),
    ("3+4i", r"3+4\mathrm{i}"),
    ("-3", "–3"),
    ("3", r"\,3\\"),
    ("3", "3\\ "),
    ("101_2", r"101_{\text{two}}"),
    ("101_2", "(101)_2"),
    (r"5\text{ PM}", r"5\text{ p.m.}"),
    (r"-\frac{37}{3}", r"-12.\overline{3}"),
    (r"0.\overline{142857}", r"\frac{1}{7}"),
    ("12500", "12 500"),
    ("12,500", r"12\,500"),
    ("15", "15 cm^2"),
    (r"15\text{ cm}^2", "15 cm^2"),
    (r"15\text{ cm}", r"15 \mathrm{ centimeters}"),
    ("52_8", "52_{8}"),
    ("90", "90 degrees"),
    (r"\frac{1}{2}", "½"),
    ("1.5", "1½"),
    ("x^2", "x²"),
    (r"(-\infty,2)", "(-∞,2)"),
    ("300000", "3×10^5"),
    (r"\frac{1}{3}", r"0.\dot{3}"),
    ("1234567", "1 234 567"),
    (r"\text{even}", r"\textbf{even}"),
    ("7", "7 days"),
    # small numbers
    (r"\frac{1}{1004!}", r"\frac{1}{1004 \cdot 1003!}"),
    ("10^{-30}", r"\frac{1}{10^{30}}"),
    (r"2^{-99}", r"\frac{1}{2^{99}}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    ("9", r"9\%"),
]
WRONG = [
    ("4", "5"),
    ("4", "-4"),
    ("4", "1,2,3,4"),
    ("4", "4 or 5"),
    ("4", "4.0001"),
    ("4", "x"),
    ("3.14", r"\pi"),
    (r"\frac{1}{3}", "0.333"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2,3)", "(3,2,1)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"-\infty", r"\infty"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ("2x", "2y"),
    (r"\text{even}", r"\text{odd}"),
    ("12:30", "12"),
    # equal to 15 decimals, or to six
    (r"\frac{1}{1004!}", r"\frac{1}{1006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("10^{-31}", "10^{-30}"),
    (r"1.5\times 10^{-20}", r"1.6\times 10^{-20}"),
    ("1", "1+10^{-20}"),
    ("0", r"\frac{1}{1000!}"),
    (r"\{2^{-99}, 2\}", r"\{2^{-98}, 2\}"),
    ("(2^{-99}, 2)", "(2^{-98}, 2)"),
    ("[0,10^{-31}]", "[0,10^{-30}]"),
    ("x=10^{-31}", "x=10^{-30}"),
    ("x+10^{-31}", "x+10^{-30}"),
    (r"\begin{pmatrix}10^{-31}\\3\end{pmatrix}", r"\begin{pmatrix}10^{-30}\\3\end{pmatrix}"),
    # bases and units
    ("52_8", "52_{9}"),
    ("52_8", r"52_{\text{nine}}"),
    ("1010_2", "1010_3"),
    ("(101_2, 3)", "(101_3, 3)"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"5\text{ cm}", "5 mm"),
    ("15 cm^2", "15 cm^3"),
    ("7 days", "7 weeks"),
    ("5 cents", "5 dollars"),
    (r"5\text{ degrees}", r"5\text{ radians}"),
    (r"12:00\text{ AM}", r"12:00 \text{ PM}"),
    (r"5\text{ p.m.}", "5 am"),
    ("101_2", r"101_{\text{three}}"),
    (r"\sqrt{2}3", "√23"),
    ("-3", "2–5"),
    ("3", "1½"),
    (r"e^{-50}", r"e^{-60}"),
    (r"\sin(10^{-20})", r"\sin(10^{-21})"),
    (r"x^2+10^{-20}", "x^2"),
    (r"\{1,10^{-16}\}", r"\{1,0\}"),
    (r"2^{100}", "2^{100}+1"),
    # numbers side by side are not their sum
    ("512", "12 500"),
    ("7", "3 4"),
    ("1", "1 4/5"),
    (r"\frac{1}{3}", r"0.\overline{4}"),
    ("3", "15 cm"),
]
KNOWN_FAILURES = [
    # (truth, answer, what Math-Verify 0.9.0 says); a change here is news for docs/rewards.md
    (r"e^{i\pi}", "-1", 0.0),  # i stays a symbol
    (r"30^\circ", r"\frac{\pi}{6}", 0.0),  # degrees are dropped, not converted
    (
        r"(-\infty, 3)",
        "x < 3",
        0.0,
    ),  # an inequality for an interval, though not the other way round
    ("1010_2", "1010", 1.0),  # a base that only one states is dropped
    (r"5\text{ pears}", r"5\text{ apples}", 1.0),  # so is a unit that is not known
    ("10", r"10\%", 1.0),  # and the percent sign, where the number fits
    ("42", "**42**", 0.0),
    ("15", "15 km/h", 0.0),
    ("300000", "3e5", 0.0),
    ("C", "C. 17", 0.0),
    (r"\frac{1}{2}", "0.500000001", 1.0),
]


RIGHT += [
    (r"\frac{9}{5}", "1 4/5 cm"),
    ("12500", r"12 500\text{ km}"),
    (r"90^\circ", r"90^{\degree}"),
    (r"90^\circ", "90^{°}"),
]
WRONG += [("2.5", "√12.5"), ("1.1", r"0.\dot{1}4285\dot{7}")]


@pytest.mark.parametrize(("truth", "answer"), RIGHT)
def test_equivalent_answers_are_right(truth: str, answer: str) -> None:
    score = score_math(f"I think \\boxed{{0}}, no: $\\boxed{{{answer}}}$.", truth)
    assert (score.value, score.outcome) == (1.0, Outcome.SCORED)


@pytest.mark.parametrize(("truth", "answer"), WRONG)
def test_other_answers_are_wrong(truth: str, answer: str) -> None:
    assert score_math(f"\\boxed{{{truth}}}, no: \\boxed{{{answer}}}", truth).value == 0.0


@pytest.mark.parametrize(("truth", "answer", "said"), KNOWN_FAILURES)
def test_known_failures_of_math_verify(truth: str, answer: str, said: float) -> None:
    assert score_math(f"\\boxed{{{answer}}}", truth).value == said


@pytest.mark.parametrize(
    "piece",
    [
        "9",
        "9 ",
        " ",
        "{",
        "}",
        "9_",
        "\\\\text{",
        "0.\\\\overline{3}",
        "\\\\, 9",
        "1/",
        "\\",
        "~",
        "\\sqrt[",
    ],
)
def test_spellings_are_read_in_linear_time(piece: str) -> None:
    started = time.thread_time()
    scorer._quick((piece * 500)[: scorer.MAX_ANSWER], piece * 2000)
    assert time.thread_time() - started < 1.0


def test_quick_verdicts_are_math_verifys() -> None:
    verify = scorer._grader().verify
    answers = sorted(
        {answer for pair in [*RIGHT, *WRONG] for answer in pair}
        | {"0.3333333", "1/3", "-0.5", "7/14"}
    )
    stated = (bases, half_of_day, lambda one: split_unit(one)[1], scorer._SEVERAL.fullmatch)
    answers = [one for one in answers if not any(read(one) for read in stated)]
    quick = [
        (one, other, verdict)
        for one in answers
        for other in answers
        if (verdict := scorer._quick(one, other)) is not None and one != other
    ]
    assert len(quick) > 200 and {verdict for *_, verdict in quick} == {True, False}
    for one, other, verdict in quick:
        parsed = [list(scorer._parse(scorer._box(tidy(text)))) for text in (one, other)]
        assert verify(parsed[1], parsed[0], timeout_seconds=None) is verdict, (one, other)


def test_without_a_box_flexible_looks_at_the_end_and_strict_does_not() -> None:
    text = "First 7. The answer is $\\frac{2}{4}$."
    assert score_math(text, "0.5", "flexible").value == 1.0
    assert score_math(text, "0.5", "strict").outcome is Outcome.UNPARSABLE
    assert score_math("no idea", "0.5", "flexible").outcome is Outcome.UNPARSABLE
    assert score_math("\\boxed{}", "0.5", "flexible").outcome is Outcome.UNPARSABLE


def test_an_unreadable_ground_truth_is_an_error_not_a_zero() -> None:
    with pytest.raises(
        ValueError, match=r"reward_model\.ground_truth: Math-Verify reads nothing in"
    ):
        score_math("\\boxed{x+1}", "")


def test_worked_solutions_get_full_marks() -> None:
    rows = [json.loads(line) for line in MATH_500_EXCERPT.read_text().splitlines()]
    assert len(rows) >= 5
    for row in rows:
        assert score_math(row["solution"], row["answer"], "strict").value == 1.0, row["answer"]


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^{9}}}}",
    "tower of ten": r"\boxed{10^{10^{10}}}",
    "python power": r"\boxed{9**9**9}",
    "two towers": r"\boxed{9^9^9}",
    "factorials": r"\boxed{9!!!!!!!}",
    "large factorial": r"\boxed{100000000!}",
    "large sum": r"\boxed{\sum_{k=1}^{10^9} \sin(k)}",
    "hard integral": r"\boxed{\int_0^1 \frac{x^{99}}{\sin x} dx}",
    "hard identity": r"\boxed{x^{1000}+1=(x+1)^{1000}}",
    "four plus a tower": r"\boxed{4+0^{10^{10^{10}}}}",
    "nested fractions": "\\boxed{" + r"\frac{1}{" * 41 + "4" + "}" * 41 + "}",
    "parentheses": "\\boxed{" + "(" * 240 + "4" + ")" * 239 + "}",
    "unbalanced": r"\boxed{4",
    "too many opened": "\\boxed{" * 150_000 + "4",
    "too many closed": r"\boxed" + "}" * 1_000_000,
    "open braces": r"\boxed{" + "{" * 1_000_000,
    "megabyte of digits": r"\boxed{" + "4" * 1_000_000 + "}",
    "megabyte of spaces": r"\boxed{5" + " " * 1_000_000 + "}",
    "megabyte of dollars": "$" * 1_000_000,
    "megabyte of words": "the answer is " * 80_000,
    "megabyte of boxes": r"\boxed{5}" * 120_000,
    "arabic four": "\\boxed{\u0664}",
    "fullwidth four": "\\boxed{\uff14}",
    "mathematical four": "\\boxed{\U0001d7d2}",
    "null": "\\boxed{4\x00}",
    "nulls": "\x00" * 100_000,
    "surrogate": "\\boxed{\ud800}",
    "bell": "\\boxed{\x074}",
    "right to left": "\\boxed{\u202e4}",
    "zero width": "\\boxed{\u200b4}",
    "every answer": r"\boxed{1, 2, 3, 4, 5}",
    "either": r"\boxed{4 \text{ or } 5}",
    "nothing": "",
    "truism": r"\boxed{x=x}",
    "true": r"\boxed{True}",
    "python": r"\boxed{__import__('os').system('true')}",
    "input": r"\boxed{\input{/etc/passwd}}",
}


def test_hostile_answers_neither_hang_nor_crash_nor_score() -> None:
    batch = [
        ScoreItem("lighteval/MATH", text, "4", {"index": i})
        for i, text in enumerate(HOSTILE.values())
    ]
    sane = ScoreItem("lighteval/MATH", r"\boxed{\frac{8}{2}}", "4")
    with RewardManager(
        BuiltinReward("flexible", ("lighteval/MATH",), memory_gib=1.0), workers=2, timeout_s=1.0
    ) as pool:
        start = time.monotonic()
        scores = pool.score_batch(batch)
        assert time.monotonic() - start < 200.0
        assert pool.score_batch([sane] * 4)[3].value == 1.0
    for name, score in zip(HOSTILE, scores, strict=True):
        assert score.value == 0.0, name
        assert score.outcome in (
            Outcome.SCORED,
            Outcome.UNPARSABLE,
            Outcome.TIMEOUT,
        ) or "memory" in (score.message or ""), f"{name}: {score.message}"


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_has_a_box_or_none_and_a_normal_form(text: str) -> None:
    assert normalize(text) == normalize(text)
    for wrapped in (text, f"\\boxed{{{text}", f"\\boxed {text}"):
        boxed = last_boxed(wrapped)
        assert boxed is None or boxed in wrapped
