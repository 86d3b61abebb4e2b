"""The table of places in docs/architecture.md names what is there.

Invariant: a function, class or constant that a row names is defined in one of the row's files, and
a configuration key in the configuration's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
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


def defined_in(path: Path) -> Iterator[str]:
    """Functions, classes, constants and fields of a file, those of a class also behind its name."""
    for node in ast.parse(path.read_text()).body:
        yield from names_of(node)
        if isinstance(node, ast.ClassDef):
            for name in chain.from_iterable(map(names_of, node.body)):
                yield from (name, f"{node.name}.{name}")


def names_of(node: ast.stmt) -> list[str]:
    """What a statement gives a name to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def looked_for(name: str) -> str:
    """Of `function(…)` its name, of `group.key` the key."""
    name = name.removesuffix("(…)")
    return name.split(".")[-1] if name.islower() else name


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row.split("|")[1].strip())
def test_names_are_defined_where_the_row_says(row: str) -> None:
    quoted = re.findall(r"`([^`]+)`", row)
    files = [*files_of(quoted), *(PACKAGE / name for name in KEYS)]
    known = set(chain.from_iterable(map(defined_in, files)))
    names = [name for name in quoted if not name.endswith((".py", "/"))]
    assert [name for name in names if looked_for(name) not in known] == []
