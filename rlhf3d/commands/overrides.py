"""`KEY=VALUE` behind a configuration: the argument, and what a shell completes of it.

Invariant: what is offered is a key, a section that leads to one, or a value that the key takes.
"""

from __future__ import annotations

from typing import Annotated

import typer


def candidates(begun: str) -> list[tuple[str, str]]:
    """What may stand where `begun` was typed, each with its help."""
    from rlhf3d.config.keys import all_keys

    name, equals, _ = begun.partition("=")
    if equals:
        choices = next((key.choices for key in all_keys() if key.name == name), ())
        return [(f"{name}={choice}", "") for choice in choices]
    found: dict[str, str] = {}
    for key in all_keys():
        if key.name.startswith(begun):
            section, dot, _ = key.name[len(begun) :].partition(".")
            # Level by level: there are more keys than anybody wants to see at once.
            found |= {f"{begun}{section}.": ""} if dot else {f"{key.name}=": key.doc}
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
