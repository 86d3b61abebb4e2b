"""What a rule of the table is, and what may become of a key.

Invariant: pure; a rule's function sees verl's value and the complete verl configuration, nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf3d.config.verl.read import Verl


@dataclass(frozen=True)
class Put:
    """A value of ours, where something has to be said about it."""

    value: Any
    differs: str
    """How it differs in meaning from verl's."""


@dataclass(frozen=True)
class Drop:
    """Nothing of ours."""

    why: str
    to_set: bool = False
    """Whether the run would be another one, so that the user has to decide."""
    same: bool = False
    """Whether nothing is lost: that is what happens here anyway."""


def same(value: Any, verl: Verl) -> Any:
    """verl's value as it stands."""
    return value


Change = Callable[[Any, Verl], Any]
"""From verl's value (the first given one) to ours, a Put or a Drop."""


@dataclass(frozen=True)
class Rule:
    """What becomes of one key of verl, or of several that are one here."""

    names: tuple[str, ...]
    """verl's names, the current one first; a * stands for anything."""
    to: str = ""
    """Our key; empty where there is none."""
    change: Change = same
    note: str = ""
    """For the documentation: what differs, or why there is no counterpart."""
    default: Any = None
    """verl's value where none is given, if ours is another."""
    always: bool = False
    """Whether it is applied where no name is given: it also depends on other keys."""


def same_name(name: str, change: Change = same, note: str = "", **more: Any) -> Rule:
    """A rule for a key that has verl's name here."""
    return Rule((name,), name, change, note, **more)


def no_counterpart(note: str, *names: str, to_set: bool = False, same: bool = False) -> Rule:
    """A rule for keys that this package does without."""
    return Rule(names, change=lambda value, verl: Drop(note, to_set, same), note=note)
