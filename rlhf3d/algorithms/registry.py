"""Names of interchangeable functions, open to a user's own file.

Invariant: a name means one function; looking up an unknown one fails with the nearest name and the
list.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def unknown_name(key: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for configuration key `key` set to `name`, which is none of `known`."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"{key}: unknown {name!r}; {hint}known: {', '.join(names)}")


class Registry(Generic[T]):
    """Entries by name; `key` is the configuration key that chooses among them."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register `entry`; ValueError when the name is taken: nothing is replaced unseen."""
        if name in self._entries:
            raise ValueError(f"{self.key}: {name!r} is already registered; choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.key, name, self._entries)
        return self._entries[name]

    def entries(self) -> dict[str, T]:
        """A copy of what is registered."""
        return dict(self._entries)

    def restore(self, entries: dict[str, T]) -> None:
        """Go back to `entries`: a file that failed half-way leaves nothing behind."""
        self._entries = dict(entries)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)
