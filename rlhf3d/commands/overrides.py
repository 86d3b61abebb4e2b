"""`KEY=VALUE` behind a configuration: the argument, and what a shell completes of it.

Invariant: what is offered is a key, a section that leads to one, or a value that the key takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlhf3d.config.convert.rules import Table


def candidates(begun: str) -> list[tuple[str, str]]:
    """What may stand where `begun` was typed, each with its help."""
    from rlhf3d.config.keys import all_keys

    name, equals, _ = begun.partition("=")
    if equals:
        choices = next((key.choices for key in all_keys() if key.name == name), ())
        return [(f"{name}={choice}", "") for choice in choices]
    return _levels(begun, {key.name: key.doc for key in all_keys()})


def keys_of(table: Table, begun: str) -> list[tuple[str, str]]:
    """The same with the keys of another framework, each with our key."""
    names: dict[str, str] = {}
    for rule in table.rules:
        names |= {name: rule.to or rule.note for name in rule.names if "*" not in name}
    return _levels(begun, names)


def _levels(begun: str, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Level by level: there are more keys than anybody wants to see at once."""
    found: dict[str, str] = {}
    for name, told in names.items():
        if name.startswith(begun):
            section, dot, _ = name[len(begun) :].partition(".")
            found |= {f"{begun}{section}.": ""} if dot else {f"{name}=": told}
    return list(found.items())


def _complete(incomplete: str) -> list[tuple[str, str]]:
    return [pair for pair in candidates(incomplete) if pair[0].startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, such as actor.optim.lr=1e-5.",
        autocompletion=_complete,
    ),
]
