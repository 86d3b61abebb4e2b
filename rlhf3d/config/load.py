"""From YAML and dotted overrides to a checked `Config`, and back.

Invariant: a `Config` that leaves here is complete and consistent, or one ConfigError names all that
is wrong. Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf3d.config import scalars
from rlhf3d.config.checks import check
from rlhf3d.config.fields import keys_of
from rlhf3d.config.keys import (
    all_keys,
    describe,
    named_paths,
    nearest_key,
    optional_section,
    with_value,
)
from rlhf3d.config.schema import Config
from rlhf3d.paths import CONFIGS, expand_home

T = TypeVar("T")


class ConfigError(ValueError):
    """Every problem of one configuration, a line each under a title."""

    def __init__(
        self, problems: Sequence[str], title: str = "The configuration has problems"
    ) -> None:
        self.problems = list(problems)
        # A problem that offers several ways has a line for each.
        lines = (problem.replace("\n", "\n    ") for problem in self.problems)
        super().__init__("\n".join([f"{title}:", *(f"  - {line}" for line in lines)]))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (its `base:` first), apply `key=value` overrides in order, and check.

    Nothing else is read, and nothing of the user's is executed: `resolve.load_run` and `inputs`
    look further. Raises ConfigError with all problems at once.
    """
    config, problems = read_config(path, overrides)
    if problems:
        raise ConfigError(problems)
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As `load_config`, with the problems beside what could be read."""
    problems: list[str] = []
    try:
        config = _expand_paths(_read(Path(path), overrides, problems), problems)
    except RecursionError:
        raise ConfigError(
            [f"{path}: a value is nested too deeply, or an alias (*name) stands within itself"]
        ) from None
    # A key that could not be read has its default here: what the checks say about it is not the
    # user's doing.
    reported = "\n".join(problems)
    unread = [key.name for key in all_keys() if key.name in reported]
    for problem in check(config):
        if not any(name in problem for name in unread):
            problems.append(problem)
    return config, problems


def _read(path: Path, overrides: Sequence[str], problems: list[str]) -> Config:
    raw = read_yaml(find_file(path))
    for override in overrides:
        try:
            merge(raw, parse_override(override))
        except ValueError as error:
            problems.append(str(error))
    return build(Config(), raw, "", problems)


def read_sections(path: Path, form: str) -> dict[str, Any]:
    """The mapping that a YAML file is, its scalars as they stand; `form` shows what is expected."""
    try:
        # utf-8-sig: editors on Windows may put a byte order mark first.
        raw = scalars.read(path.read_bytes().decode("utf-8-sig"), comments=True)
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"]
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    if scalars.is_null(raw):
        return {}
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: expected sections ({form}), found {_type_name(raw)}"])
    return raw


def _expand_paths(config: Config, problems: list[str]) -> Config:
    """With ~ as the home folder in every path, once and for all."""
    for name, value in named_paths(config).items():
        texts = value if isinstance(value, tuple) else (value,)
        try:
            expanded = tuple(map(expand_home, texts))
        except ValueError as error:
            problems.append(f"{name} = {', '.join(texts)}: {error}")
            continue
        if expanded != texts:
            config = with_value(config, name, expanded if isinstance(value, tuple) else expanded[0])
    return config


def find_file(path: Path) -> Path:
    """The configuration file at `path`, or the one of that name that ships with the package."""
    return path if path.is_file() else _shipped(path) or path


def _shipped(path: Path) -> Path | None:
    """The configuration of that name that ships with the package; None for another path."""
    shipped = CONFIGS / path.name
    by_name = str(path) in (path.name, f"configs/{path.name}")
    return shipped if by_name and shipped.is_file() else None


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in `path`, merged over that of its `base:` (see `_base_file`)."""
    if path.resolve() in seen:
        raise ConfigError([f"base: {path} derives from itself"])
    if not path.is_file():
        shipped = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise ConfigError([f"no configuration file {path}; these ship with rlhf3d: {shipped}"])
    raw = read_sections(path, "`model:`, `data:` …")
    # Not a key of the run: it must be gone before the rest is read as keys.
    base = raw.pop("base", None)
    if scalars.is_null(base):
        return raw
    if not isinstance(base, str):
        raise ConfigError([f"{path}: base: expected the name of a file, found {_type_name(base)}"])
    try:
        of = _base_file(path, str(base))
    except ValueError as error:
        raise ConfigError([f"{path}: base: {base}: {error}"]) from None
    # Depth first: what stands nearer to the user's file wins.
    inherited = read_yaml(of, (*seen, path.resolve()))
    merge(inherited, raw)
    return inherited


def _base_file(path: Path, base: str) -> Path:
    """The file that `base:` in `path` names: beside that, or one that ships with the package."""
    name = Path(expand_home(base))
    beside = path.parent / name
    return beside if beside.is_file() else _shipped(name) or beside


def files_of(path: Path) -> list[Path]:
    """A configuration file and those that it derives from."""
    found = [find_file(path)]
    while True:
        base = read_sections(found[-1], "sections").get("base")
        if not isinstance(base, str) or not base or scalars.is_null(base):
            return found
        found.append(_base_file(found[-1], str(base)))


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as `{"a": {"b": c}}`, the value read by the type of the key."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if key[:1] in ("+", "~"):
        right = f"{key.lstrip('+~')}={value}" if equals else f"{key.lstrip('+~')}=VALUE"
        raise ValueError(f"override {text!r}: Hydra's +, ++ and ~ are not used here: write {right}")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {text!r}: expected key.name=value")
    names, depth, kind = _place_of(key)
    try:
        parsed = scalars.read_as(value, kind)
    except yaml.YAMLError as error:
        raise ValueError(
            f"override {text!r}: the value is not YAML ({' '.join(str(error).split())})"
        ) from error
    except ValueError as error:
        raise ValueError(f"override {text!r}: {error}") from error
    for number, name in reversed(list(enumerate(names))):
        parsed = {name: parsed} if number < depth else Entries({name: parsed})
    return parsed


def _place_of(key: str) -> tuple[list[str], int, Any]:
    """The names on the way to a dotted key, how many of them lead to a key of the schema, the type.

    What follows is a name in a mapping; in one of texts or numbers, it may have dots.
    """
    names, kind = key.split("."), Config
    for depth, name in enumerate(names):
        section: Any = kind if is_dataclass(kind) else optional_section(kind)
        if section is not None:
            kind = get_type_hints(section).get(name, Any)
        elif get_origin(kind) is dict and get_args(kind)[1] is not Any:
            # Such as reward.scorers.my.source=gsm8k: the rest is one name with a dot.
            return [*names[:depth], ".".join(names[depth:])], depth, get_args(kind)[1]
        else:
            return names, depth, Any
    return names, len(names), kind


class Entries(dict[str, Any]):
    """Entries of a mapping, which change it; a plain mapping takes its place."""


def merge(into: dict[str, Any], other: dict[str, Any], section: Any = Config) -> None:
    """Lay `other` over `into`, section by section and key by key.

    `section` is what both are read as; None within the mapping of a key, such as `kwargs`.
    """
    hints = get_type_hints(section) if section is not None else {}
    for key, value in other.items():
        kind = hints.get(key)
        below = kind if is_dataclass(kind) else optional_section(kind)
        # A mapping that is given whole means itself: with {}, nothing is left of the former one.
        joins = below is not None or isinstance(value, Entries)
        if joins and isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value, below)
        else:
            into[key] = value


def build(default: T, raw: Any, where: str, problems: list[str]) -> T:
    """`default` (a section) with the values of `raw`; what does not fit is added to `problems`."""
    if scalars.is_null(raw):
        return default
    if not isinstance(raw, dict):
        problems.append(
            f"{where} = {scalars.shown(raw)}: expected a section of keys, found {_type_name(raw)}"
        )
        return default
    # Without include_extras the markers are gone: `coerce` sees plain types, `checks` the rules.
    hints = get_type_hints(type(default))
    keys = keys_of(default)
    changes: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in keys:
            problems.append(f"{name}: no such key; {nearest_key(name)}{_nested_hint(key)}")
            continue
        section = getattr(default, key)
        optional = None if scalars.is_null(value) else optional_section(hints[key])
        if is_dataclass(section):
            changes[key] = build(section, value, name, problems)
        elif optional is not None:
            # Null by default: its keys start from the section's own defaults.
            changes[key] = build(optional(), value, name, problems)
        else:
            if isinstance(value, Entries) and isinstance(section, dict):
                value = {**section, **value}
            try:
                changes[key] = coerce(value, hints[key])
            except TypeError:
                fix = scalars.hint(value, hints[key]) or _near_choice(value, hints[key])
                problems.append(
                    f"{name} = {scalars.shown(value)}: expected {describe(hints[key])}{fix}"
                )
    return replace(default, **changes)  # type: ignore[type-var]


def _nested_hint(key: Any) -> str:
    return "; in a file keys are nested, with dots they are overrides" if "." in str(key) else ""


def _near_choice(value: Any, kind: Any) -> str:
    """A hint with the choice nearest to a value."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _type_name(value: Any) -> str:
    try:
        return type(scalars.as_anything(value)).__name__
    except TypeError:
        return "str"


def coerce(value: Any, kind: Any) -> Any:
    """`value` as `kind`, where nothing is lost; raises TypeError otherwise.

    '1e-5' is a float, 4.0 an int, 'a' a tuple of one str.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return scalars.as_anything(value)
    if origin in (Union, types.UnionType):
        return _coerce_to_one(value, args)
    if origin is tuple:
        return _coerce_to_tuple(value, args)
    if origin is dict:
        return _coerce_to_dict(value, args)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return str(value)
        raise TypeError(value)
    return _coerce_to_scalar(value, kind)


def _coerce_to_scalar(value: Any, kind: Any) -> Any:
    if kind is type(None) and scalars.is_null(value):
        return None
    if kind is bool:
        truth = scalars.as_bool(value)
        if truth is not None:
            return truth
    elif kind is str:
        if isinstance(value, str) and not scalars.is_null(value):
            return str(value)
    elif kind in (int, float):
        return _coerce_to_number(value, kind)
    raise TypeError(value)


def _coerce_to_number(value: Any, kind: type[int] | type[float]) -> int | float:
    number = scalars.as_number(value)
    if number is None:
        raise TypeError(value)
    if kind is int and isinstance(number, int):
        return number  # exact, however large
    if not math.isfinite(number) or (kind is int and not float(number).is_integer()):
        raise TypeError(value)
    return kind(number)


def _coerce_to_dict(value: Any, args: tuple[Any, ...]) -> dict[Any, Any]:
    if isinstance(value, dict):
        return {coerce(key, args[0]): coerce(item, args[1]) for key, item in value.items()}
    if scalars.is_null(value) and isinstance(value, str):  # a heading with nothing below it
        return {}
    raise TypeError(value)


def _coerce_to_one(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`value` as the first of several types that takes it.

    Its own type comes first; text without quotes is text only if it is nothing else.
    """
    plain = isinstance(value, scalars.Plain)
    # YAML's null is spelled null: None would be read as the text, such as a folder of that name.
    if plain and type(None) in kinds and value.lower() == "none":
        raise TypeError(value)

    def comes_last(kind: Any) -> bool:
        return kind is str if plain else kind is not type(value)

    # A stable sort: kinds that are equal here are tried in the order of the annotation.
    for kind in sorted(kinds, key=comes_last):
        try:
            return coerce(value, kind)
        except TypeError:
            continue
    raise TypeError(value)


def _coerce_to_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # `a,b` without brackets may be one value or two: refused, with a hint how to write either.
    if scalars.is_null(value) or (isinstance(value, scalars.Plain) and "," in value):
        raise TypeError(value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
    if len(items) != len(kinds):
        raise TypeError(value)
    return tuple(coerce(item, of) for item, of in zip(items, kinds, strict=True))


def config_to_yaml(config: Config) -> str:
    """The complete configuration as YAML that `load_config` reads back to an equal one."""
    return scalars.write(_plain(config))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {key: _plain(getattr(value, key)) for key in keys_of(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
