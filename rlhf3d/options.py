"""Options of the command line: what they may be, and which go together.

Invariant: an option that is given is used, or the command is refused; ~ is the home folder in every
path.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from rlhf3d.paths import expand_user

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


_HELP = {"help_option_names": ["-h", "--help"]}


class Commands(typer.Typer):
    """Commands whose paths may begin with ~ and whose numbers are finite."""

    def __init__(self, **options: Any) -> None:
        super().__init__(context_settings=_HELP, **options)

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """See Typer."""
        return super().command(*args, cls=_Command, context_settings=_HELP, **options)


class DefaultCommand(TyperGroup):
    """A group of commands with one that is meant where none is named."""

    default = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default's name before what follows."""
        known = (*self.commands, *ctx.help_option_names)
        # A shell that completes the first word asks with none.
        if not args and ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        if not args or args[0] not in known:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class _Command(TyperCommand):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for param in self.params:
            # Typer shows the Python type of those that may be given several times.
            param.display_type = partial(_several, param.display_type)  # type: ignore[attr-defined]

    def invoke(self, ctx: Any) -> Any:
        hints = get_type_hints(self.callback)
        for name, value in ctx.params.items():
            # Python's float reads nan and inf, and nan passes the comparisons with min and max.
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"--{name.replace('_', '-')} {value}: no finite number")
            if value and _takes_paths(hints.get(name)):
                many = isinstance(value, list | tuple)
                # A shell leaves ~ alone in `--output=~/runs`, which does not begin with it.
                expanded = [Path(expand_user(str(path))) for path in (value if many else [value])]
                ctx.params[name] = expanded if many else expanded[0]
        return super().invoke(ctx)


def _several(own: Callable[[Any], str], context: Any) -> str:
    """The type of a parameter in its help: <path …> for <list[Path]>."""
    return re.sub(r"list\[(.*)\]", lambda found: f"{found[1].lower()} …", own(context))


def _takes_paths(kind: Any) -> bool:
    """Whether an option's type is a path, a list of paths, or one of them or None."""
    return any(option in (Path, list[Path]) for option in (kind, *get_args(kind)))


def show_version(asked: bool) -> None:
    """Print the version of the package and end, where `--version` is given."""
    if asked:
        try:
            typer.echo(f"rlhf3d {version('rlhf3d')}")
        except PackageNotFoundError as error:
            raise ValueError("rlhf3d is not installed: `make setup` installs it") from error
        raise typer.Exit


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a command that takes dataclasses: each of their fields is an option.

    Typer sees one flat signature; `command` gets the dataclasses.
    """
    # With extras: Typer reads its options from Annotated.
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    groups: dict[str, type[Any]] = {}
    for name, kind in hints.items():
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
    flat: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in groups:
            flat += _options_of(groups[parameter.name])
        else:
            annotation = hints[parameter.name]
            flat.append(parameter.replace(annotation=annotation, kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_flat_signature(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{item.name: values.pop(item.name) for item in fields(kind)})
        command(**values)

    with_flat_signature.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    annotations = {parameter.name: parameter.annotation for parameter in flat}
    # Typer takes names from the signature and types from the annotations.
    with_flat_signature.__annotations__ = annotations | {"return": None}
    return with_flat_signature


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    """Its fields as parameters; --help shows them in a panel with the name of the class."""
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for item in fields(group):
        option = get_args(hints[item.name])[1]
        option.rich_help_panel = group.__name__
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=hints[item.name],
            )
        )
    return parameters


def refuse_unused(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ValueError for those of these options that are given."""
    for name in names:
        source = context.get_parameter_source(name)
        # A default is nobody's wish; only what was typed would be ignored.
        if source is not None and source.name == "COMMANDLINE":
            option = next(param.opts[0] for param in context.command.params if param.name == name)
            raise ValueError(f"{option} would be ignored: {why}")


def scorers_of(pairs: Iterable[str] | None) -> dict[str, str]:
    """The mapping that `--scorer DATA_SOURCE=SCORER` options describe. Raises ValueError."""
    scorers: dict[str, str] = {}
    for pair in pairs or ():
        # The last =: a data source may have one in its name, a scorer does not.
        source, equals, scorer = pair.rpartition("=")
        if not (source and equals and scorer):
            raise ValueError(
                f"--scorer {pair}: expected DATA_SOURCE=SCORER, such as my/data=math_verify"
            )
        if scorers.setdefault(source, scorer) != scorer:
            raise ValueError(f"--scorer {pair}: {source} has {scorers[source]} already")
    return scorers


def json_object(text: str, option: str) -> dict[str, Any]:
    """The JSON object that an option holds. Raises ValueError."""
    import json

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text}: must be a JSON object")
    return value
