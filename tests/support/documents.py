"""The project's Markdown, and the command lines in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf3d.user_code import load_file

ROOT = Path(__file__).parents[2]
site = load_file(ROOT / "tools" / "docs_site.py", "tool")
"""The hooks of the documentation's site."""

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
_PROGRAM = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?rlhf3d ")
_SHELL = re.compile(r"^(?:[|&;]+|\d?>+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    document: Path
    language: str
    text: str


@dataclass(frozen=True)
class CommandLine:
    """A call of `rlhf3d`."""

    document: Path
    text: str
    words: tuple[str, ...]
    """Behind the name of the program."""
    complete: bool
    """From a block of code, to be typed as it is; in a sentence, arguments may be left out."""

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.text}"


def name_of(document: Path) -> str:
    """From the root."""
    return str(document.relative_to(ROOT))


def blocks(document: Path) -> Iterator[Block]:
    """Its blocks of code."""
    for found in site.FENCE.finditer(document.read_text(encoding="utf-8")):
        first, *lines = found[0].splitlines()
        yield Block(document, first.strip().lstrip("`").strip(), "\n".join(lines[:-1]))


def in_sentences(document: Path) -> Iterator[str]:
    """Code within its sentences and tables."""
    prose = site.FENCE.sub("", document.read_text(encoding="utf-8"))
    for paragraph in prose.split("\n\n"):
        for found in re.finditer(r"`([^`]+)`", paragraph):
            yield " ".join(found[1].split())


def command_lines() -> Iterator[CommandLine]:
    """Every call of `rlhf3d` in the documents."""
    for document in DOCUMENTS:
        for block in blocks(document):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from _calls(document, line.strip(), complete=True)
        for text in in_sentences(document):
            yield from _calls(document, text, complete=False)


def _calls(document: Path, text: str, complete: bool) -> Iterator[CommandLine]:
    if not _PROGRAM.match(text):
        return
    words: list[str] = []
    for word in shlex.split(_PROGRAM.sub("", text), comments=True):
        if _SHELL.match(word):
            break
        # In a sentence, brackets mark what may be left out.
        words.append(word if complete else word.strip("[]"))
    yield CommandLine(document, text, tuple(words), complete)
