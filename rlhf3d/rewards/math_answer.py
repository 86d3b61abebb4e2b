r"""The answer of a MATH completion: what stands in its last `\boxed{…}`, and that text in one fixed form.

Invariant: linear time and no exception for any text; an unbalanced box is no answer.
"""

from __future__ import annotations

import re

_BOXES = ("\\boxed", "\\fbox")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox{…}`, or `\boxed x`); null where it is missing or unbalanced."""
    start, box = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    position = start + len(box)
    while position < len(text) and text[position].isspace():
        position += 1
    if position == len(text):
        return None
    if text[position] != "{":  # \boxed 5$: TeX boxes one token; data sets mean all up to the dollar
        return re.split(r"[$\n]", text[position : position + 200], maxsplit=1)[0].strip() or None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[position:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[position + 1 : position + brace.start()].strip()
    return None


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
    text = answer.strip().rstrip(".").replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
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
