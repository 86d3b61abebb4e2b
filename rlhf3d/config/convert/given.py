"""What a user gave another framework, as dotted keys.

Invariant: a value that is not known here (an interpolation that leads nowhere, what only a shell
knows) is named with its key, and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from rlhf3d.config import scalars

_OVERRIDE = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w@/-]*(?:\.[\w@/-]+)*)(?:=(.*))?", re.DOTALL)
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_INTERPOLATIONS = 32
"""How many interpolations a value may be made of, one in another or leading to another."""

Resolver = Callable[[list[Any]], Any]
"""What `${name:a,b}` makes of its values; ValueError where it makes nothing."""

EMPTY: Mapping[str, Resolver] = {}


@dataclass
class Given:
    """What a user gave."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """The framework's own, of keys where they mean another run here."""
    values: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Keys whose value could not be known: what it needs."""
    notes: list[str] = field(default_factory=list)
    """What else the reader should know."""

    def get(self, *names: str) -> Any:
        """The first value that is given among several names, or the default of the first name."""
        given = (self.values.get(name) for name in names)
        default = self.defaults.get(names[0])
        return next((value for value in given if value is not None), default)

    def put(self, key: str, value: Any) -> None:
        """Give `key`, or all keys of a section, another value."""
        self.unknown.pop(key, None)
        self.values.pop(key, None)
        self.values |= dict(flat(value, key))

    def override(self, text: str) -> bool:
        """Apply one override as Hydra writes it; whether it is one."""
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            return False
        sign, key, value = match.groups()
        if sign == "~":
            self.values.pop(key, None)
        elif value is None:
            return False
        else:
            self.put(key, read_value(value))
        return True

    def complete(
        self, overrides: Sequence[str], expected: str, resolvers: Mapping[str, Resolver] = EMPTY
    ) -> None:
        """Take every override, then lead interpolations to their values.

        ValueError for a text that is no override; `expected` says what is one.
        """
        for text in overrides:
            if not self.override(text):
                raise ValueError(f"override {text!r}: expected {expected}")
        self._interpolate(resolvers)

    def _interpolate(self, resolvers: Mapping[str, Resolver]) -> None:
        """Replace `${other.key}`, `${.sibling}`, `${oc.select:other.key,default}` and `resolvers`.

        `???`, Hydra's mark for a value that must be given, is none.
        """
        for key, value in list(self.values.items()):
            known = self._known(key, value, resolvers)
            if isinstance(known, str) and "${" in known:
                del self.values[key]
                self.unknown[key] = known
            else:
                self.values[key] = None if known == "???" else known

    def _known(self, key: str, value: Any, resolvers: Mapping[str, Resolver]) -> Any:
        """`value` without interpolations, as far as they lead."""
        for _ in range(_INTERPOLATIONS):
            found = _INNERMOST.search(value) if isinstance(value, str) else None
            if found is None:
                return value
            target = self._target(key, found, resolvers)
            if found[0] == value:
                value = target
            else:
                value = value.replace(found[0], str(target))
            if target == found[0]:
                return value  # left as it is, it is reported
        return value

    def _target(self, key: str, match: re.Match[str], resolvers: Mapping[str, Resolver]) -> Any:
        """What stands for one interpolation; itself where that is not known."""
        name, colon, arguments = (part.strip() for part in match[1].partition(":"))
        if not colon:
            return self.values.get(_absolute(name, key), match[0])
        if name == "oc.select":
            name, _, default = (part.strip() for part in arguments.partition(","))
            return self.values.get(_absolute(name, key), read_value(default))
        try:
            return resolvers[name]([read_value(text.strip()) for text in arguments.split(",")])
        except (KeyError, ValueError):
            return match[0]


def _absolute(name: str, key: str) -> str:
    return key.rpartition(".")[0] + name if name.startswith(".") else name


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key; a list is one value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
        return
    try:
        yield prefix, scalars.as_anything(value)
    except TypeError:  # such as 0.5_2, which YAML 1.1 takes for 0.52
        yield prefix, str(value)


def read_value(text: str) -> Any:
    """A text as YAML, or itself."""
    try:
        value = scalars.read(text)
    except (yaml.YAMLError, ValueError):
        return text
    if isinstance(value, dict):
        return value
    return next(value for _, value in flat(value, "value"))


def read_text(path: Path, expected: str) -> str:
    """A text file of the user's; ValueError, which says what is `expected`."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: give {expected}") from None
