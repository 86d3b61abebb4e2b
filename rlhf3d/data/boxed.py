r"""The content of a text's last `\boxed{…}`, where MATH's solutions and completions state answers.

Invariant: linear time and no exception for any text; an unbalanced box is no answer.
"""

from __future__ import annotations

import re

_BOXES = ("\\boxed", "\\fbox")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox{…}`, or `\boxed x`).

    Null where it is missing or unbalanced.
    """
    start, box = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    position = start + len(box)
    while position < len(text) and text[position].isspace():
        position += 1
    if position == len(text):
        return None
    if text[position] != "{":
        # \boxed 5$: TeX boxes one token, but data sets mean all up to the dollar.
        return re.split(r"[$\n]", text[position : position + 200], maxsplit=1)[0].strip() or None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[position:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[position + 1 : position + brace.start()].strip()
    return None
