"""The keys of the configuration by dotted name, read from the schema.

Invariant: the docstring under a field is the only text about it; help and error messages quote it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from itertools import chain
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rlhf3d.config.fields import IsPath, OneOf, keys_of, markers, rules_text
from rlhf3d.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One key."""

    name: str
    """Dotted."""
    type: Any
    """With the markers of `fields`."""
    default: Any
    doc: str
    """The docstring under the field."""

    @property
    def kind(self) -> str:
        """Its type as a user reads it."""
        return describe(self.type)

    @property
    def rules(self) -> str:
        """Its ranges and choices as a user reads them; empty where there are none."""
        return rules_text(self.type)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values it takes, where they can be listed; a list takes one of them as well."""
        return choices_of(self.type) or ()

    @property
    def is_path(self) -> bool:
        """Whether it names a file or folder, or several."""
        return any(isinstance(marker, IsPath) for marker in markers(self.type))


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, in the order of the schema.

    Keys below a section that is null have the section's own defaults.
    """
    return tuple(_keys_below(Config(), ""))


def path_keys() -> list[str]:
    """The keys of files and folders."""
    return [key.name for key in all_keys() if key.is_path]


def named_paths(config: Config) -> dict[str, Any]:
    """The files and folders that a configuration names, by key: one or a tuple of them."""
    values = {key: value_of(config, key) for key in path_keys()}
    return {key: value for key, value in values.items() if value is not None}


CODE_KEYS = (
    "custom_reward_function.path",
    "algorithm.custom_path",
    "data.curriculum.path",
    "environment.path",
)
"""Of Python files of the user's that a run executes."""


def code_files(config: Config) -> dict[str, str]:
    """Those that a configuration names, by key: also a parser of tool calls."""
    files = {key: value_of(config, key) for key in CODE_KEYS}
    if config.environment.enabled:
        files["environment.tool_format"] = config.environment.parser_file
    return {key: file for key, file in files.items() if file is not None}


def _keys_below(section: Any, prefix: str) -> Iterator[Key]:
    docs = _attribute_docs(type(section))
    for name, kind in keys_of(section).items():
        value, dotted = getattr(section, name), f"{prefix}{name}"
        if is_dataclass(value):
            yield from _keys_below(value, f"{dotted}.")
            continue
        yield Key(dotted, kind, value, docs.get(name, ""))
        optional = optional_section(kind)
        if optional is not None:
            yield from _keys_below(optional(), f"{dotted}.")


def optional_section(kind: Any) -> type[Any] | None:
    """The section of a field that is a section or null."""
    options = (option for option in get_args(kind) if isinstance(option, type))
    return next((option for option in options if is_dataclass(option)), None)


def _attribute_docs(section: type[Any]) -> dict[str, str]:
    """Field -> the string that stands under it in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    # Python keeps no docstring of an attribute: it is the string statement after the field.
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(doc))
            ):
                docs[name] = " ".join(doc.split())
    return docs


def describe(kind: Any) -> str:
    """A type as a user reads it: `float or null`, `list of str`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"list of {count}{describe(args[0])}"
    if origin is dict:
        return "mapping"
    if is_dataclass(kind):
        return "section"
    return "null" if kind is type(None) else str(kind.__name__)


def choices_of(kind: Any) -> tuple[str, ...] | None:
    """The values of a type; None where there is no end of them."""
    origin, args = get_origin(kind), get_args(kind)
    names = [marker.names for marker in markers(kind) if isinstance(marker, OneOf)]
    if names:
        return names[0]
    if origin in (Annotated, tuple):
        return choices_of(args[0])
    if origin is Literal:
        return tuple(map(str, args))
    if origin in (Union, types.UnionType):
        parts = [choices_of(part) for part in args]
        return None if None in parts else tuple(chain.from_iterable(filter(None, parts)))
    return {bool: ("true", "false"), type(None): ("null",)}.get(kind)


def nearest_key(name: str) -> str:
    """A hint with the known key nearest to `name`: one with the same last part if there is any."""
    known = [key.name for key in all_keys()]
    # Sections can be misspelled too.
    known += sorted({key.rpartition(".")[0] for key in known} - {""})
    # The right name under a wrong section: there any distance will do.
    same_leaf = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    cutoff = 0.0 if same_leaf else 0.5
    nearest = difflib.get_close_matches(name, same_leaf or known, n=1, cutoff=cutoff)
    return f"did you mean {nearest[0]}?" if nearest else "`rlhf3d config` lists all keys"


def value_of(section: Any, name: str) -> Any:
    """The value under a dotted name; None under a section that is null."""
    for part in name.split("."):
        if section is None:
            return None
        section = getattr(section, part)
    return section


def with_value(section: Any, name: str, value: Any) -> Any:
    """A section with another value under a dotted name."""
    first, _, rest = name.partition(".")
    if rest:
        value = with_value(getattr(section, first), rest, value)
    return replace(section, **{first: value})
