"""docs/troubleshooting.md quotes messages as the code has them."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
from support.documents import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
VALUE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""In the place of what a message is told when it is made."""


def text_of(node: ast.expr) -> str | None:
    """The text of a string in the source."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) or VALUE for part in parts)
    return None


@cache
def messages() -> str:
    """Every string of the package, and the Makefile, one below the other."""
    texts = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for file in sorted((ROOT / "rlhf3d").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = text_of(node) if isinstance(node, ast.expr) else None
            texts += [text.replace("\n", " ")] if text else []
    return "\n".join(texts)


def is_said(quoted: str) -> bool:
    """Whether one message holds the parts of a quotation, in their order."""
    parts = [re.escape(part) for part in quoted.split("…")]
    return re.search(".+?".join(parts), messages()) is not None


def test_the_page_has_messages() -> None:
    assert len(QUOTED) > 40 and len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("quoted", QUOTED)
def test_each_message_is_one_of_ours(quoted: str) -> None:
    assert is_said(quoted), f"{PAGE.name}: {quoted}: no such message"
    assert max(map(len, quoted.split("…"))) > 8, "too short to be found by"


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        ("cannot resume from …:", True),
        ("cannot resume from the …:", False),
        ("GiB available … host memory: needs", False),
    ],
)
def test_what_is_said(quoted: str, said: bool) -> None:
    assert is_said(quoted) == said
