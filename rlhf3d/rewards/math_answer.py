r"""The text of a MATH answer: one spelling, one normal form, and what differs by its text alone.

Invariant: linear time and no exception for any text. Spellings are only unified where they cannot
mean anything else: two answers that differ never get one form.
Runs in: scoring process. Pure.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from rlhf3d.data.boxed import last_boxed as last_boxed  # users' files import it from here too

_GAP = r"(?:\s|~|\\[ ,:;!])+"
"""Space of any kind, as text and as TeX."""

# --- tidy: the spelling that Math-Verify reads ---

_SPELLINGS = (
    (re.compile(r"\^\s*\{\s*(?:°|\\degrees?)\s*\}"), r"^\\circ "),
    (re.compile(r"\^?\s*(?:°|\\degrees?(?![a-zA-Z]))"), r"^\\circ "),
    # Sizes of brackets.
    (re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])"), ""),
    (re.compile(r"\\varnothing(?![a-zA-Z])|∅"), r"\\emptyset"),
    # Type faces and colors; the group that they apply to stays.
    (re.compile(r"\\(?:boldsymbol|bm|pmb|textbf|textit|emph|underline|mathsf)(?![a-zA-Z])\s*"), ""),
    (re.compile("²"), "^2"),
    (re.compile("³"), "^3"),
    (re.compile("∞"), r"\\infty"),
    (re.compile("×"), r"\\times "),
    (re.compile(r"√\s*([0-9]{1,40}+|[a-zA-Z](?![a-zA-Z]))(?![.,]?[0-9])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(?=\{)"), r"\\sqrt"),
    (re.compile(r"(\\sqrt\s*\[[^\[\]]{1,40}\])\s*([0-9a-zA-Z])"), r"\1{\2}"),
    (re.compile(r"\\(?:nice|s|c)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text)?color\s*\{[a-zA-Z]{1,40}\}"), ""),
    (re.compile(r"\\mathrm\s*\{\s*i\s*\}"), "i"),
    # At the start no dash is a range.
    (re.compile(r"\A[–—](?=\s*[0-9.\\])"), "-"),
    # Spaces and line ends around it.
    (re.compile(r"\A(?:~|\\[ ,:;!])+|(?:~|\\[ ,:;!]|\\\\|\\quad)*\\?\s*\Z"), ""),
    (re.compile(r"\\(overline|bar|dot)\s*([0-9])"), r"\\\1{\2}"),
)
_ONE_CHARACTER = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
# At most 40 digits each: int(), which reads them below and in `_MIXED`, raises for more than
# 4,300.
_REPEATING = re.compile(
    r"(?<![0-9A-Za-z.,}])([0-9]{0,40})\.([0-9]{0,40})"
    r"\\(?:overline|bar|dot)\s*\{([0-9]{1,40})\}(?!\s*[0-9])"
)
_MIXED = re.compile(rf"(-?[0-9]{{1,40}}){_GAP}([0-9]{{1,40}})/([0-9]{{1,40}})")
_SPACED_THOUSANDS = re.compile(rf"-?[0-9]{{1,3}}(?:{_GAP}[0-9]{{3}}){{1,12}}(?:\.[0-9]+)?")
_WITH_BASE = re.compile(
    r"\(?\s*([0-9A-F]{1,100})\s*\)?\s*_\s*\{?\s*\(?(?:\\(?:text|mbox|mathrm)\s*\{)?\s*"
    r"([0-9]{1,2}|[a-z]{3,6})\s*\}?\)?\s*\}?"
)
"""One number and its base, however that is written."""
_BASE_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
_BASE_NAMES = {word: str(base) for base, word in enumerate(_BASE_WORDS, start=2)}


def tidy(answer: str) -> str:
    r"""`answer` in the spelling that Math-Verify reads.

    Unified are 90°, `\bigl(`, `\varnothing`, `\boldsymbol{4}`, 0.\overline{3} and the like. What is
    nothing but a mixed number (1 4/5), a number with spaces (12 500) or with a base becomes
    `1\frac{4}{5}`, 12500 and `52_{8}`.
    """
    text = answer.strip()
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    text = _ONE_CHARACTER.sub(_fraction_of_character, text)
    text = _REPEATING.sub(_fraction_of_repeating, text)
    if text.startswith("{") and _group_end(text) == len(text):
        text = text[1:-1].strip()
    # 1 5/4 is no mixed number, and might be two answers.
    if (match := _MIXED.fullmatch(text)) and int(match[2]) < int(match[3]):
        return f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    if match := _WITH_BASE.fullmatch(text):
        return f"{match[1]}_{{{_BASE_NAMES.get(match[2], match[2])}}}"
    if _SPACED_THOUSANDS.fullmatch(text):
        return re.sub(_GAP, "", text)
    return text


def _fraction_of_character(match: re.Match[str]) -> str:
    # `numeric` gives a float; no character of `_ONE_CHARACTER` has a denominator above 8.
    return _as_tex(Fraction(unicodedata.numeric(match[0])).limit_denominator(10))


def _fraction_of_repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction: its digits without the period's, over nines and zeros."""
    head, rest, period = match[1] or "0", match[2], match[3]
    numerator = int(head + rest + period) - int(head + rest)
    return _as_tex(Fraction(numerator, 10 ** len(rest + period) - 10 ** len(rest)))


def _as_tex(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _group_end(text: str) -> int:
    """Where the group ends that `text` begins with; 0 where it does not."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()
    return 0


# --- normalize: what two answers must share to be the same without any computation ---

_UNITS = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*[^{}]*\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$")
_TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_WITHOUT_MEANING = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\displaystyle|\\\$|\$|\^\s*\{?\\circ\s*\}?|\\%|%"
)
_THIN_COMMA = re.compile(r"\{,\}|,\s*\\!\s*")
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # 3 4 is not 34
_SHORT_FRAC = re.compile(r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])")
_SHORT_NUMERATOR = re.compile(r"\\frac([0-9a-zA-Z])\{([^{}]*)\}")
_SHORT_DENOMINATOR = re.compile(r"\\frac\{([^{}]*)\}([0-9a-zA-Z])")
_HALF_SHORT_FRAC = re.compile(rf"{_SHORT_NUMERATOR.pattern}|{_SHORT_DENOMINATOR.pattern}")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9a-zA-Z])")
_EQUATION = re.compile(r"[a-zA-Z]=(.+)", re.DOTALL)
_DECIMAL = re.compile(r"-?\.[0-9]+")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def normalize(answer: str) -> str:
    r"""`answer` without what does not change it.

    That is spacing, units, `\left`, short fractions, `x =` and the comma of 1,000, in the spirit of
    the string comparison of the MATH paper (Hendrycks et al., 2021); nothing is computed.
    """
    text = tidy(answer.strip().rstrip("."))
    text = text.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    # Before `_TEXT` unwraps the groups: after it, a unit looks like a variable.
    without_unit = _UNITS.sub("", text).strip()
    # An answer of nothing but text (\text{even}) is no unit.
    text = _TEXT.sub(r"\1", without_unit or text)
    text = _WITHOUT_MEANING.sub("", _THIN_COMMA.sub(",", text)).strip()
    # The complete text only: in (1,200) or 1,200,3 a comma may separate two numbers.
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = _SPACE.sub("", text)
    text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _HALF_SHORT_FRAC.sub(_full_fraction, text)
    if match := _EQUATION.fullmatch(text):
        text = match[1]
    if match := _SLASH.fullmatch(text):
        text = f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    if _DECIMAL.fullmatch(text):
        text = text.replace(".", "0.", 1)
    return text


def _full_fraction(match: re.Match[str]) -> str:
    return f"\\frac{{{match[1] or match[3]}}}{{{match[2] or match[4]}}}"


# --- Bases, units and times of day, in which two answers may differ ---

_BASE = re.compile(r"(?<![0-9A-F])([0-9A-F]+)\s*_[\s_]*([0-9]+|[a-z]+)")


def bases(answer: str) -> set[str]:
    r"""The bases its numbers are written in, empty where none is stated.

    52_8, 52_{\text{eight}} and 52 base 8 are all in "8".
    """
    plain = re.sub(r"\\(?:text|mbox|mathrm)|[{()]", "", answer)
    plain = plain.replace("base", "_").replace("}", " ")
    stated = [base for number, base in _BASE.findall(plain) if re.search("[0-9]", number)]
    return {_BASE_NAMES.get(base, base) for base in stated}


_UNIT_NAMES = (
    "mm millimeter millimeters|cm centimeter centimeters|m meter meters|km kilometer kilometers|"
    "in inch inches|ft foot feet|yd yard yards|mi mile miles|g gram grams|kg kilogram kilograms|"
    "lb lbs pound pounds|s sec second seconds|min minute minutes|h hr hour hours|day days|"
    "week weeks|month months|year years|degree degrees|radian radians|dollar dollars|cent cents|"
    "unit units"
)
_UNIT_OF: dict[str, str] = {}
"""Name of a unit -> the unit."""
for _names in _UNIT_NAMES.split("|"):
    _UNIT_OF.update(dict.fromkeys(_names.split(), _names.split()[0]))
_OPTIONAL_GAP = _GAP.replace(")+", ")*")
_WITH_UNIT = re.compile(
    rf"(?P<number>.*?[0-9}})])"
    rf"(?:{_GAP}(?P<bare>[a-z]+)"
    rf"|{_OPTIONAL_GAP}\\(?:text|mbox|mathrm|textrm)\s*\{{\s*(?P<text>[a-z]+)\s*\}})"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?\.?",
    re.DOTALL,
)


def split_unit(answer: str) -> tuple[str, str | None]:
    """The answer without its unit, and that unit with its power (cm2); null for no known unit."""
    match = _WITH_UNIT.fullmatch(answer.strip())
    if match is None:
        return answer, None
    name = match["bare"] or match["text"]
    # `5 m` may be 5 times m; `5\text{ m}` is meters.
    may_be_a_variable = match["bare"] is not None and len(name) == 1
    if name not in _UNIT_OF or may_be_a_variable:
        return answer, None
    return match["number"], _UNIT_OF[name] + (match["power"] or "")


_HALF_OF_DAY = re.compile(
    r"[0-9](?:\s|~|\\[ ,:;!]|\\(?:text|mbox|mathrm)|\{){0,10}([aApP])\.?\s?[mM](?![a-zA-Z])"
)


def half_of_day(answer: str) -> str | None:
    """Of a time of day, "a" or "p" (5 PM, 5 p.m.); null where none is stated."""
    match = _HALF_OF_DAY.search(answer)
    return match[1].lower() if match else None
