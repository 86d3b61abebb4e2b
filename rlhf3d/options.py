"""Options of the command line: what they may be, and which go together.

Invariant: an option that is given is used, or the command is refused; ~ is the home folder in every path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from rlhf3d.paths import expand_user


class Commands(typer.Typer):
    """Commands whose paths may begin with ~ and whose numbers are finite."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """See Typer."""
        return super().command(*args, cls=_Command, **options)


class _Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        hints = get_type_hints(self.callback)
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"--{name.replace('_', '-')} {value}: no finite number")
            kind = hints.get(name)
            if value and (
                kind is Path
                or Path in get_args(kind)
                or list[Path] in get_args(kind)
                or kind == list[Path]
            ):
                many = isinstance(value, list | tuple)
                expanded = [Path(expand_user(str(path))) for path in (value if many else [value])]
                ctx.params[name] = expanded if many else expanded[0]
        return super().invoke(ctx)


def refuse_unused(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ValueError for those of these options that are given."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(param.opts[0] for param in context.command.params if param.name == name)
            raise ValueError(f"{option} would be ignored: {why}")


def scorers_of(pairs: Iterable[str] | None) -> dict[str, str]:
    """Of --scorer DATA_SOURCE=SCORER. Raises ValueError."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        source, equals, scorer = pair.rpartition("=")
        if not (source and equals and scorer):
            raise ValueError(
                f"--scorer {pair}: expected DATA_SOURCE=SCORER, such as my/data=math_verify"
            )
        if found.setdefault(source, scorer) != scorer:
            raise ValueError(f"--scorer {pair}: {source} has {found[source]} already")
    return found
