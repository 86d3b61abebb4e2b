"""What a table of another framework's keys is, what a rule of it, and what may become of a key.

Invariant: pure; a rule's function sees the value and all that was given, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values by which a key says that it is not used."""
NEVER_REACHED = 1.0e9
"""A bound that no ratio reaches: log-ratios are clamped to 20."""


@dataclass(frozen=True)
class Put:
    """A value of ours, where something has to be said about it."""

    value: Any
    differs: str
    """How it differs in meaning."""


@dataclass(frozen=True)
class Drop:
    """Nothing of ours."""

    why: str
    to_set: bool = False
    """Whether the run would be another one, so that the user has to decide."""
    same: bool = False
    """Whether nothing is lost: that is what happens here anyway."""


def same(value: Any, given: Any) -> Any:
    """The value as it stands."""
    return value


Change = Callable[[Any, Any], Any]
"""From a value (the first given one) and the `Given` of a framework to ours, a Put or a Drop."""


def only_if(condition: Callable[[Any], Any], otherwise: str, change: Change = same) -> Change:
    """For keys that mean something only where a `condition` holds of what was given."""

    def checked(value: Any, given: Any) -> Any:
        return change(value, given) if condition(given) else Drop(otherwise, same=True)

    return checked


def if_on(switch: str, change: Change = same) -> Change:
    """For keys that mean something only where another one is on."""
    return only_if(lambda given: given.get(switch), f"{switch} is off", change)


def not_offered(note: str, *switches: str) -> Change:
    """What has no counterpart, and is missed only where one of its switches is on."""

    def change(value: Any, given: Any) -> Drop:
        on = any(given.get(switch) for switch in switches)
        return Drop(note, to_set=on, same=not on)

    return change


@dataclass(frozen=True)
class Rule:
    """What becomes of one key, or of several that are one here."""

    names: tuple[str, ...]
    """Its names, the current one first; a * stands for anything."""
    to: str = ""
    """Our key; empty where there is none."""
    change: Change = same
    note: str = ""
    """For the documentation: what differs, or why there is no counterpart."""
    default: Any = None
    """The framework's value where none is given, if ours is another."""
    always: bool = False
    """Whether it is applied where no name is given: it also depends on other keys."""


def same_name(name: str, change: Change = same, note: str = "", **more: Any) -> Rule:
    """A rule for a key that has the same name here."""
    return Rule((name,), name, change, note, **more)


def computed(to: str, change: Change, note: str = "") -> Rule:
    """A rule for a key of ours that follows from several of theirs."""
    return Rule((), to, change, note, always=True)


def no_counterpart(note: str, *names: str, to_set: bool = False, same: bool = False) -> Rule:
    """A rule for keys that this package does without; `to_set` where they are not off."""
    return Rule(
        names,
        change=lambda value, given: Drop(note, to_set and value not in OFF, same),
        note=note,
    )


def only_value(wanted: Any, otherwise: str, to_set: bool = True) -> Change:
    """For keys whose one value is what happens here."""

    def change(value: Any, given: Any) -> Drop:
        if value == wanted:
            return Drop("so it is here", same=True)
        return Drop(otherwise, to_set)

    return change


def renamed(names: dict[Any, Any]) -> Change:
    """The name of a choice as ours; others as they stand."""

    def change(value: Any, given: Any) -> Any:
        return next((ours for theirs, ours in names.items() if theirs == value), value)

    return change


def model_folder(value: Any, given: Any) -> Any:
    """A model is a folder here, not a name on the hub."""
    text = str(value)
    if text.startswith(("/", "~", ".")) or text.count("/") != 1:
        return value
    folder = f"models/{text.partition('/')[2]}"
    return Put(folder, f"a folder: hf download {text} --local-dir {folder}")


@dataclass(frozen=True)
class Table:
    """All keys of a framework."""

    framework: str
    """Its name, such as verl."""
    page: str
    """The page of the documentation that has the table."""
    rules: tuple[Rule, ...]
    """In the order in which they are asked."""
    kinds: Mapping[str, tuple[Any, tuple[str, ...]]] = field(default_factory=dict)
    """For keys that functions reckon with: what is said of them, their type, their names."""

    @cached_property
    def _exact(self) -> dict[str, Rule]:
        found: dict[str, Rule] = {}
        for rule in self.rules:
            for name in rule.names:
                found.setdefault(name, rule)
        return found

    def rule_of(self, name: str) -> Rule | None:
        """The rule for a key: by its name, else by the first pattern that fits."""
        exact = self._exact.get(name)
        return exact or next((rule for rule in self.rules if _fits(rule, name)), None)

    def check_kinds(self, values: Mapping[str, Any]) -> None:
        """ValueError where a value that functions reckon with is of the wrong kind."""
        for said, (kind, names) in self.kinds.items():
            for name in names:
                value = values.get(name)
                if value is not None and not isinstance(value, kind):
                    raise ValueError(f"{name} = {value!r}: expected {said}, as in {self.framework}")


def _fits(rule: Rule, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in rule.names)
