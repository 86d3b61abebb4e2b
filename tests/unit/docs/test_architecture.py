"""The table of places in docs/architecture.md names what is there.

Invariant: a function, class or constant that a row names is defined in one of the row's files, and
a configuration key in the configuration's.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.documents import ROOT

PACKAGE = ROOT / "rlhf3d"
KEYS = ("config/schema.py", "config/models.py")


def table_rows() -> list[str]:
    """The rows of the table, without its two lines of heading."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## Where to change it")[1].split("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("|")][2:]


def files_of(quoted: list[str]) -> list[Path]:
    """The row's files; one without its folder lies in a folder of the row's others."""
    names = [name.replace("NAME", "*") for name in quoted if name.endswith(".py")]
    found = [path for name in names for path in PACKAGE.glob(name)]
    folders = {path.parent for path in found}
    folders |= {PACKAGE / name for name in quoted if name.endswith("/")}
    for name in names:
        near = [folder / name for folder in folders if (folder / name).is_file()]
        assert near or any(PACKAGE.glob(name)), f"{name} is not there"
        found += near
    return found


def is_defined(name: str, text: str) -> bool:
    """Whether a function, class, constant or field of this name begins somewhere in `text`."""
    begins = rf"^\s*(?:(?:async )?def|class) {name}\b|^\s*{name}\s*(?::[^=\n]*)?=|^\s*{name}: "
    return re.search(begins, text, re.MULTILINE) is not None


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row.split("|")[1].strip())
def test_names_are_defined_where_the_row_says(row: str) -> None:
    quoted = re.findall(r"`([^`]+)`", row)
    files = [*files_of(quoted), *(PACKAGE / name for name in KEYS)]
    text = "\n".join(path.read_text() for path in files)
    names = [name for name in quoted if not name.endswith((".py", "/"))]
    assert [name for name in names if not is_defined(last_part(name), text)] == []


def last_part(name: str) -> str:
    """Of `Class.method`, `group.key` or `function(…)`."""
    return re.split(r"\W", name.removesuffix("(…)"))[-1]
