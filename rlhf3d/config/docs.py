"""Every configuration key with its type, default and meaning, read from the schema itself.

Invariant: the docstring under a field is the only text about it; help and error messages quote it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf3d.config import schema
from rlhf3d.config.schema import Config


@dataclass(frozen=True)
class FieldDoc:
    """One key: dotted name, type, default and meaning (the docstring under the field)."""

    name: str
    kind: str
    default: Any
    doc: str


def field_docs() -> list[FieldDoc]:
    """Every key of the configuration, in the order of the schema; of a section that is null, with its own defaults."""
    return list(_field_docs(Config(), "", _attribute_docs()))


def _field_docs(section: Any, where: str, docs: dict[tuple[str, str], str]) -> Iterator[FieldDoc]:
    hints = get_type_hints(type(section))
    for item in fields(section):
        value, name = getattr(section, item.name), f"{where}{item.name}"
        if is_dataclass(value):
            yield from _field_docs(value, f"{name}.", docs)
        else:
            doc = docs.get((type(section).__name__, item.name), "")
            yield FieldDoc(name, describe(hints[item.name]), value, doc)
            if (optional := optional_section(hints[item.name])) is not None:
                yield from _field_docs(optional(), f"{name}.", docs)


def optional_section(kind: Any) -> type[Any] | None:
    """The section of a field that is a section or null."""
    return next(
        (option for option in get_args(kind) if is_dataclass(option) and isinstance(option, type)),
        None,
    )


def _attribute_docs() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that stands under the field in schema.py."""
    docs = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, following in zip(node.body, node.body[1:], strict=False):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                    value=ast.Constant(value=str(doc))
                ):
                    docs[node.name, name] = doc
    return docs


def describe(kind: Any) -> str:
    """A type as a user reads it: `float or null`, `list of str`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        return (
            f"list of {describe(args[0])}"
            if args[-1] is Ellipsis
            else f"list of {len(args)} {describe(args[0])}"
        )
    if origin is dict:
        return "mapping"
    if is_dataclass(kind):
        return "section"
    return "null" if kind is type(None) else str(kind.__name__)


def nearest_key(name: str) -> str:
    """A hint with the known key nearest to `name`: one with the same last part if there is any."""
    known = [doc.name for doc in field_docs()]
    known += sorted({key.rpartition(".")[0] for key in known} - {""})
    same_leaf = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(
        name, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.5
    )
    return f"did you mean {nearest[0]}?" if nearest else "`rlhf3d config` lists all keys"
