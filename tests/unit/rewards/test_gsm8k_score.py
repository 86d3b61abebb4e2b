"""The gsm8k rule on hand-made and hostile completions."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.rewards.gsm8k import canonical, compute_score, extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 boxes of 4 apples make 12.", "12"),
        ("The price is $1,234.50", "1234.5"),
        ("She has -5 left", "-5"),
        ("a loss of -$7", "-7"),
        ("a loss of $-7", "-7"),
        ("minus as typeset: \u22128", "-8"),
        ("16-3", "3"),
        ("read pages 10-12", "12"),
        ("(4)-1", "1"),
        ("about 50%", "50"),
        ("half is .5", "0.5"),
        ("12.0", "12"),
        ("1, 2,3", "3"),
        ("1,000,000 people", "1000000"),
        ("12,3456", "3456"),
        ("007", "7"),
        ("-0", "0"),
        ("answer: 9!", "9"),
        ("#### 4 or rather 5", "5"),
        ("no number", None),
        ("", None),
        ("\uff11\uff12 \u0663", None),
    ],
)
def test_flexible_takes_the_last_number(text: str, answer: str | None) -> None:
    assert extract_answer(text, "flexible") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 * 2 = 24\n#### 24", "24"),
        ("#### 3 wait, no\n#### 1,080 dollars", "1080"),
        ("#### $5.50", "5.5"),
        ("#### -3", "-3"),
        ("####7", "7"),
        ("#### 5\nand then 6", "5"),
        ("the answer is 24", None),
        ("#### twenty", None),
        ("### 24", None),
    ],
)
def test_strict_wants_hashes(text: str, answer: str | None) -> None:
    assert extract_answer(text, "strict") == answer


def test_scores_compare_numbers_not_text() -> None:
    assert compute_score("It is 12.0", "12").score == 1.0
    assert compute_score("It is 1,000.", "1000").score == 1.0
    assert compute_score("It is 1000", "1,000").score == 1.0
    assert compute_score("It is 12.5", "12").score == 0.0
    assert compute_score("It is -12", "12").score == 0.0
    nothing = compute_score("I do not know", "12", "strict")
    assert (nothing.score, nothing.answer) == (0.0, None)


def test_numbers_beyond_floats_differ_in_their_last_digit() -> None:
    assert compute_score("9007199254740993", "9007199254740992").score == 0.0
    assert compute_score("9" * 10_000, "9" * 10_000).score == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "7" * 1_000_000,
        "1," * 500_000,
        "-$" * 500_000,
        "####" + " " * 1_000_000,
        "#### " * 200_000,
        "#" * 1_000_000,
        "1." * 500_000,
        "1 " * 500_000,
        "111,111," * 125_000 + "1",
        "#### " + "1," * 500_000 + "x",
        "\x00" * 1_000_000,
        "\ud800 12",
        "\u0661" * 100_000,
    ],
    ids=lambda text: ascii(text[:8]),
)
@pytest.mark.parametrize("method", ["strict", "flexible"])
def test_hostile_text_is_quick_and_never_raises(text: str, method: str) -> None:
    start = time.thread_time()
    assert compute_score(text, "12", method).score in (0.0, 1.0)
    assert time.thread_time() - start < 5.0  # a quadratic pattern needs minutes


@settings(deadline=None)
@given(st.text())
def test_any_text_gets_a_score(text: str) -> None:
    for method in ("strict", "flexible"):
        assert compute_score(text, "12", method).score in (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_any_integer_is_found_however_it_is_written(number: int) -> None:
    for text in (f"x = {number}", f"x is {number:,}.", f"x: {number}.00", f"#### {number:,}"):
        assert extract_answer(text) == str(number)
        assert compute_score(text, str(number)).score == 1.0


def test_canonical_form() -> None:
    assert canonical("-", "1,012.50") == "-1012.5"
    assert canonical("-", "0.0") == "0"


def test_user_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"reward\.method: no 'lenient'.*strict, flexible"):
        extract_answer("1", "lenient")
    with pytest.raises(ValueError, match=r"ground_truth: 'twelve' is not one number"):
        compute_score("12", "twelve")
