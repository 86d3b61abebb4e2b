"""From what another framework was given to a configuration of ours, with the fate of each key.

Invariant: every key that was given is in the findings, once; what is written was read by the
loader of runs, whose problems are handed on.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from rlhf3d.config import scalars
from rlhf3d.config.convert.given import Given
from rlhf3d.config.convert.rules import OFF, Drop, Put, Rule, Table
from rlhf3d.config.keys import value_of
from rlhf3d.config.load import read_config
from rlhf3d.config.schema import Config

Became = Literal["to set", "differs", "no counterpart", "unknown", "converted", "same by default"]
BECAME: tuple[Became, ...] = (
    "to set",
    "unknown",
    "differs",
    "no counterpart",
    "converted",
    "same by default",
)
"""What may become of a key, the most urgent first."""
_UNSET = object()


@dataclass(frozen=True)
class Finding:
    """What became of one key."""

    name: str
    """The framework's; empty for what follows from its defaults."""
    value: Any
    became: Became
    to: str = ""
    """Our key."""
    ours: Any = None
    """Its value."""
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """A configuration and where it comes from."""

    values: dict[str, Any]
    """What differs from our defaults, by dotted key."""
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    """What a run would be refused for."""
    notes: tuple[str, ...]

    @property
    def to_set(self) -> list[str]:
        """What the user has to decide before the run means what the former did."""
        asked = [finding for finding in self.findings if finding.became == "to set"]
        told = [
            f"{item.name} = {item.value}: {item.note}" if item.name else item.note for item in asked
        ]
        return [*told, *self.problems]

    def to_yaml(self) -> str:
        """The configuration as a file."""
        return scalars.write(_nested(self.values))


def convert(given: Given, table: Table) -> Conversion:
    """What was given as a configuration of ours. Executes nothing of the user's.

    Raises ValueError where what others depend on is of the wrong kind.
    """
    table.check_kinds(given.values)
    findings: list[Finding] = []
    for rule in table.rules:
        findings += apply(rule, given, table)
    for name, value in given.values.items():
        if table.rule_of(name) is None:
            findings.append(Finding(name, value, "unknown", note=_nearest(name, table)))
    findings += [_without_value(name, what, table) for name, what in given.unknown.items()]
    values = {item.to: item.ours for item in findings if item.to}
    config, problems = _load(values)
    defaults = {key for key in values if _is_default(key, config)}
    findings = [_settled(item, defaults, problems) for item in findings]
    kept = {key: value for key, value in values.items() if key not in defaults}
    # A value that cannot be read stays, so that the user sees what it was.
    kept |= {key: values[key] for key in values if _is_named(key, problems)}
    findings = [item for item in findings if item.name or item.became != "same by default"]
    findings.sort(key=lambda item: BECAME.index(item.became))
    ordered = {key: kept[key] for key in values if key in kept}
    return Conversion(ordered, tuple(findings), tuple(problems), tuple(given.notes))


def apply(rule: Rule, given: Given, table: Table) -> Iterator[Finding]:
    """What a rule makes of the keys that are given, or of the framework's default."""
    names = [name for name in given.values if table.rule_of(name) is rule]
    if any("*" in name for name in rule.names):
        for name in names:
            yield _one(rule, name, given.values[name], given, _target(rule, name))
        return
    # The current name first, and one that is set before one that is null.
    names.sort(key=rule.names.index)
    names.sort(key=lambda name: given.values[name] is None)
    default = rule.default if rule.default is not None else _UNSET
    value = given.values[names[0]] if names else default
    if value is _UNSET and not rule.always:
        return
    if value is None and not rule.always:
        for name in names:
            yield Finding(name, None, "same by default", note="null: not set")
        return
    first = _one(rule, "", None if value is _UNSET else value, given, rule.to)
    for name in names:
        became = first.became
        yield Finding(name, given.values[name], became, first.to, first.ours, first.note)
    if not names:
        yield first


def _nearest(name: str, table: Table) -> str:
    """What an unknown key may have been meant for."""
    known: list[str] = []
    for rule in table.rules:
        known += rule.names
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else f"not in the table of {table.page}"


def _without_value(name: str, what: str, table: Table) -> Finding:
    """A key whose value only a shell or a program knows, which matters where we have such a key."""
    rule = table.rule_of(name)
    if rule is not None and not rule.to:
        return Finding(name, what, "no counterpart", note=rule.note)
    told = f"its value is {what}: give it, such as {name}=VALUE"
    return Finding(name, what, "to set", note=told)


def _target(rule: Rule, name: str) -> str:
    """Our key for a name that a * stands for."""
    pattern = next((one for one in rule.names if fnmatchcase(name, one)), "")
    return rule.to.replace("*", name.removeprefix(pattern.rstrip("*"))) if pattern else rule.to


def _one(rule: Rule, name: str, value: Any, given: Given, to: str) -> Finding:
    made = rule.change(value, given)
    if isinstance(made, Drop):
        # What is off is not missed, unless just that has to be decided on.
        off = made.same or (value in OFF and not made.to_set)
        became: Became = "to set" if made.to_set else "no counterpart"
        return Finding(name, value, "same by default" if off else became, note=made.why)
    if isinstance(made, Put):
        return Finding(name, value, "differs", to, made.value, made.differs)
    return Finding(name, value, "converted", to, made)


def _load(values: dict[str, Any]) -> tuple[Config, list[str]]:
    """The configuration as a run would read it, and what it would be refused for."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "converted.yaml"
        file.write_text(scalars.write(_nested(values)), encoding="utf-8")
        return read_config(file)


def _settled(finding: Finding, defaults: set[str], problems: list[str]) -> Finding:
    """With `same by default` where our default says it."""
    same = finding.became == "converted" and finding.to in defaults
    if not same or _is_named(finding.to, problems):
        return finding
    return Finding(
        finding.name, finding.value, "same by default", finding.to, finding.ours, finding.note
    )


def _is_named(key: str, problems: list[str]) -> bool:
    return any(problem.startswith(f"{key} ") for problem in problems)


def _is_default(key: str, config: Config) -> bool:
    """Whether a key has our default; an entry of a mapping never has."""
    try:
        return bool(value_of(config, key) == value_of(Config(), key))
    except AttributeError:
        return False


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        section = sections
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return sections
