r"""The answer of a MATH completion: what stands in its last `\boxed{…}`, and that text in one fixed form.

Invariant: linear time and no exception for any text; an unbalanced box is no answer. Spellings are only unified where
they cannot mean anything else: two answers that differ never get one form.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from rlhf3d.data.boxed import last_boxed as last_boxed  # users' files import it from here too

_SPELLINGS = (
    (re.compile(r"\^\s*\{\s*(?:°|\\degrees?)\s*\}"), r"^\\circ "),
    (re.compile(r"\^?\s*(?:°|\\degrees?(?![a-zA-Z]))"), r"^\\circ "),
    (re.compile(r"\\[bB]igg?[lrm]?(?![a-zA-Z])"), ""),  # sizes of brackets
    (re.compile(r"\\varnothing(?![a-zA-Z])|∅"), r"\\emptyset"),
    (
        re.compile(r"\\(?:boldsymbol|bm|pmb|textbf|textit|emph|underline|mathsf)(?![a-zA-Z])\s*"),
        "",
    ),  # leaves the group
    (re.compile("²"), "^2"),
    (re.compile("³"), "^3"),
    (re.compile("∞"), r"\\infty"),
    (re.compile("×"), r"\\times "),
    (re.compile(r"√\s*([0-9]{1,40}+|[a-zA-Z](?![a-zA-Z]))(?![.,]?[0-9])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(?=\{)"), r"\\sqrt"),
    (re.compile(r"(\\sqrt\s*\[[^\[\]]{1,40}\])\s*([0-9a-zA-Z])"), r"\1{\2}"),
    (re.compile(r"\\(?:nice|s|c)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text)?color\s*\{[a-zA-Z]{1,40}\}"), ""),  # leaves the group
    (re.compile(r"\\mathrm\s*\{\s*i\s*\}"), "i"),
    (re.compile(r"\A[–—](?=\s*[0-9.\\])"), "-"),  # at the start no dash is a range
    (
        re.compile(r"\A(?:~|\\[ ,:;!])+|(?:~|\\[ ,:;!]|\\\\|\\quad)*\\?\s*\Z"),
        "",
    ),  # spaces and line ends around it
    (re.compile(r"\\(overline|bar|dot)\s*([0-9])"), r"\\\1{\2}"),
)
_ONE_CHARACTER = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_GAP = r"(?:\s|~|\\[ ,:;!])+"
_REPEATING = re.compile(
    r"(?<![0-9A-Za-z.,}])([0-9]{0,40})\.([0-9]{0,40})\\(?:overline|bar|dot)\s*\{([0-9]{1,40})\}(?!\s*[0-9])"
)
_MIXED = re.compile(rf"(-?[0-9]{{1,40}}){_GAP}([0-9]{{1,40}})/([0-9]{{1,40}})")
_SPACED_THOUSANDS = re.compile(rf"-?[0-9]{{1,3}}(?:{_GAP}[0-9]{{3}}){{1,12}}(?:\.[0-9]+)?")


def tidy(answer: str) -> str:
    r"""`answer` in the spelling that Math-Verify reads: 90°, `\bigl(`, `\varnothing`, `\boldsymbol{4}`, 0.\overline{3}.

    Where it is nothing but a mixed number (1 4/5) or a number with spaces (12 500), as `1\frac{4}{5}` and 12500.
    """
    text = answer.strip()
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    text = _REPEATING.sub(_as_fraction, _ONE_CHARACTER.sub(_spelled_out, text))
    if text.startswith("{") and _group_end(text) == len(text):
        text = text[1:-1].strip()
    if (match := _MIXED.fullmatch(text)) and int(match[2]) < int(match[3]):
        return f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    if match := _WITH_BASE.fullmatch(text):
        return f"{match[1]}_{{{_BASE_NAMES.get(match[2], match[2])}}}"
    return re.sub(_GAP, "", text) if _SPACED_THOUSANDS.fullmatch(text) else text


def _spelled_out(match: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(match[0])).limit_denominator(10)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _as_fraction(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction: its digits without the period's, over nines and zeros."""
    head, rest, period = match[1] or "0", match[2], match[3]
    value = Fraction(
        int(head + rest + period) - int(head + rest), 10 ** len(rest + period) - 10 ** len(rest)
    )
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _group_end(text: str) -> int:
    """Where the group ends that `text` begins with; 0 where it does not."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()
    return 0


_WITH_BASE = re.compile(
    r"\(?\s*([0-9A-F]{1,100})\s*\)?\s*_\s*\{?\s*\(?(?:\\(?:text|mbox|mathrm)\s*\{)?\s*"
    r"([0-9]{1,2}|[a-z]{3,6})\s*\}?\)?\s*\}?"
)
"""One number and its base, however that is written."""
_BASE = re.compile(r"(?<![0-9A-F])([0-9A-F]+)\s*_[\s_]*([0-9]+|[a-z]+)")
_BASE_NAMES = dict(
    zip(
        "two three four five six seven eight nine ten eleven twelve".split(),
        map(str, range(2, 13)),
        strict=True,
    )
)


def bases(answer: str) -> set[str]:
    r"""The bases its numbers are written in (52_8, 52_{\text{eight}}, 52 base 8): "8"; empty where none is stated."""
    plain = (
        re.sub(r"\\(?:text|mbox|mathrm)|[{()]", "", answer).replace("base", "_").replace("}", " ")
    )
    stated = [base for number, base in _BASE.findall(plain) if re.search("[0-9]", number)]
    return {_BASE_NAMES.get(base, base) for base in stated}


_UNIT_NAMES = (
    "mm millimeter millimeters|cm centimeter centimeters|m meter meters|km kilometer kilometers|in inch inches|"
    "ft foot feet|yd yard yards|mi mile miles|g gram grams|kg kilogram kilograms|lb lbs pound pounds|"
    "s sec second seconds|min minute minutes|h hr hour hours|day days|"
    "week weeks|month months|year years|degree degrees|radian radians|dollar dollars|cent cents|unit units"
)
UNITS = {name: names.split()[0] for names in _UNIT_NAMES.split("|") for name in names.split()}
"""Names of units -> the unit."""
_WITH_UNIT = re.compile(
    rf"(?P<number>.*?[0-9}})])(?:{_GAP}(?P<bare>[a-z]+)|{_GAP.replace(')+', ')*')}"
    r"\\(?:text|mbox|mathrm|textrm)\s*\{\s*(?P<text>[a-z]+)\s*\})\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?\.?",
    re.DOTALL,
)


def split_unit(answer: str) -> tuple[str, str | None]:
    """The answer without its unit, and that unit with its power (cm2); null where it has none that is known."""
    match = _WITH_UNIT.fullmatch(answer.strip())
    name = match and (match["bare"] or match["text"])
    if (
        match is None or name not in UNITS or (match["bare"] and len(name) == 1)
    ):  # one bare letter may be a variable
        return answer, None
    return match["number"], UNITS[name] + (match["power"] or "")


_HALF_OF_DAY = re.compile(
    r"[0-9](?:\s|~|\\[ ,:;!]|\\(?:text|mbox|mathrm)|\{){0,10}([aApP])\.?\s?[mM](?![a-zA-Z])"
)


def half_of_day(answer: str) -> str | None:
    """Of a time of day, "a" or "p" (5 PM, 5 p.m.); null where none is stated."""
    match = _HALF_OF_DAY.search(answer)
    return match[1].lower() if match else None


_UNITS = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*[^{}]*\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$")
_TEXT = re.compile(r"\\(?:text|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_DROPPED = re.compile(r"\\left|\\right|\\[!,;: ]|\\displaystyle|\\\$|\$|\^\s*\{?\\circ\s*\}?|\\%|%")
_THIN_COMMA = re.compile(r"\{,\}|,\s*\\!\s*")
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # 3 4 is not 34
_SHORT_FRAC = re.compile(r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])")
_HALF_SHORT_FRAC = re.compile(r"\\frac([0-9a-zA-Z])\{([^{}]*)\}|\\frac\{([^{}]*)\}([0-9a-zA-Z])")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9a-zA-Z])")
_EQUATION = re.compile(r"[a-zA-Z]=(.+)", re.DOTALL)
_DECIMAL = re.compile(r"-?\.[0-9]+")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def normalise(answer: str) -> str:
    r"""`answer` without what does not change it: spacing, units, `\left`, short fractions, `x =`, 1,000's comma.

    In the spirit of the string comparison of the MATH paper (Hendrycks et al., 2021); nothing is computed.
    """
    text = (
        tidy(answer.strip().rstrip(".")).replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    )
    bare = _UNITS.sub("", text).strip()
    text = _TEXT.sub(r"\1", bare or text)
    text = _DROPPED.sub("", _THIN_COMMA.sub(",", text)).strip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = _SPACE.sub("", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text))
    text = _HALF_SHORT_FRAC.sub(lambda m: f"\\frac{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}", text)
    if match := _EQUATION.fullmatch(text):
        text = match[1]
    if match := _SLASH.fullmatch(text):
        text = f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    if _DECIMAL.fullmatch(text):
        text = text.replace(".", "0.", 1)
    return text
