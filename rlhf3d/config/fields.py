"""What stands at a field of `schema.py` besides its type: ranges, choices, and that it is a path.

Invariant: a marker is data. Checks, error messages and `rlhf3d config` all read it from the field.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bound:
    """A limit of a number."""

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class OneOf:
    """Names that stand elsewhere (`Literal` is for those that stand at the field)."""

    names: tuple[str, ...]
    extensible: bool = False
    """Whether algorithm.custom_path may add names."""

    @property
    def text(self) -> str:
        """The names, for messages."""
        return f"one of {', '.join(self.names)}"

    def holds(self, value: Any) -> bool:
        """Whether the value is one of the names."""
        return value in self.names


@dataclass(frozen=True)
class IsPath:
    """A file or folder of the user's: a leading ~ is the home folder."""


Rule = Bound | OneOf


def at_least(limit: float) -> Bound:
    """The number is `limit` or more."""
    return Bound(f"at least {limit}", lambda value: value >= limit)


def above(limit: float) -> Bound:
    """The number is more than `limit`."""
    return Bound(f"above {limit}", lambda value: value > limit)


def at_most(limit: float) -> Bound:
    """The number is `limit` or less."""
    return Bound(f"at most {limit}", lambda value: value <= limit)


def below(limit: float) -> Bound:
    """The number is less than `limit`."""
    return Bound(f"below {limit}", lambda value: value < limit)


NOT_A_KEY = {"is_key": False}
"""Metadata of a field that no file sets."""

Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
Share = Annotated[float, at_least(0), at_most(1)]
Overlong = Literal["error", "filter", "truncate_left", "truncate_right"]
"""What to do with prompts that are too long, in a run and in `rlhf3d evaluate`."""
UserPath = Annotated[str, IsPath()]


def keys_of(section: Any) -> dict[str, Any]:
    """The keys of a section, or of its class, and their types with markers."""
    section = section if isinstance(section, type) else type(section)
    hints = get_type_hints(section, include_extras=True)
    names = [item.name for item in fields(section) if item.metadata.get("is_key", True)]
    return {name: hints[name] for name in names}


def markers(kind: Any) -> Iterator[Any]:
    """The markers in a type, wherever they stand in it."""
    if get_origin(kind) is Annotated:
        yield from kind.__metadata__
    # In unions and tuples as well: `Count | None` has the marker one level down.
    for part in get_args(kind):
        yield from markers(part)


def rules_text(kind: Any) -> str:
    """The ranges and choices of a type, for people; empty where there are none."""
    texts = [marker.text for marker in markers(kind) if isinstance(marker, Rule)]
    return " and ".join(dict.fromkeys(texts))


def broken_rule(value: Any, kind: Any) -> Rule | None:
    """The rule of a type that a value of the type breaks; null breaks none."""
    if value is None:
        return None
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        rules = [marker for marker in kind.__metadata__ if isinstance(marker, Rule)]
        return next((rule for rule in rules if not rule.holds(value)), None)
    if origin is tuple:
        # A tuple's items all have one annotated type, also where their number is fixed.
        broken = (broken_rule(item, parts[0]) for item in value)
        return next((rule for rule in broken if rule is not None), None)
    if origin in (Union, types.UnionType):
        # At most one part of a union is annotated: the others are null, bool or text.
        annotated = [part for part in parts if get_origin(part) is Annotated]
        return broken_rule(value, annotated[0]) if annotated else None
    return None
