"""From YAML and dotted overrides to a checked `Config`, and back.

Invariant: a `Config` that leaves here is complete and consistent, or one ConfigError names all that is wrong.
Imports nothing heavy.
"""

from __future__ import annotations

import math
import types
from collections.abc import Hashable, Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf3d.config.checks import check, check_files
from rlhf3d.config.docs import describe, field_docs, nearest_key, optional_section
from rlhf3d.config.schema import Config

T = TypeVar("T")


class ConfigError(ValueError):
    """Every problem of one configuration, a line each under a title."""

    def __init__(self, problems: Sequence[str], title: str = "The configuration has problems") -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{title}:", *(f"  - {problem}" for problem in self.problems)]))


def load_config(path: str | Path, overrides: Sequence[str] = (), files: bool = True) -> Config:
    """Read a YAML file (its `base:` file first), apply `key.name=value` overrides in order, and check.

    `files=False` leaves out the checks that look at the disk (model, data and reward files).
    Raises ConfigError with all problems at once.
    """
    raw = read_yaml(Path(path))
    problems: list[str] = []
    for override in overrides:
        try:
            merge(raw, parse_override(override))
        except ValueError as error:
            problems.append(str(error))
    config = build(Config(), raw, "", problems)
    # A key that could not be read has its default here: what the checks say about it is not the user's doing.
    unread = [doc.name for doc in field_docs() if any(doc.name in problem for problem in problems)]
    checked = check(config) + (check_files(config) if files else [])
    problems += [problem for problem in checked if not any(name in problem for name in unread)]
    if problems:
        raise ConfigError(problems)
    return config


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML's own rule is to keep the last in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"given twice: {', '.join(twice)}", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in `path`, merged over the file its top-level `base:` names (relative to `path`)."""
    if path.resolve() in seen:
        raise ConfigError([f"base: {path} derives from itself"])
    if not path.is_file():
        hint = f"; did you mean {Path('configs') / path}?" if (Path("configs") / path).is_file() else ""
        raise ConfigError([f"no configuration file {path}{hint}"])
    try:
        raw = yaml.load(path.read_text(), Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError([f"{path} is not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(raw or {}, dict):
        raise ConfigError([f"{path}: expected sections (`model:`, `data:` …), found {type(raw).__name__}"])
    raw = raw or {}
    base = raw.pop("base", None)
    if base is None:
        return raw
    inherited = read_yaml(path.parent / str(base), (*seen, path.resolve()))
    merge(inherited, raw)
    return inherited


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as `{"a": {"b": c}}`, the value read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ValueError(f"override {text!r}: expected key.name=value")
    try:
        parsed = yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: the value is not YAML ({' '.join(str(error).split())})") from error
    for name in reversed(key.strip().split(".")):
        parsed = {name: parsed}
    return parsed


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    """Lay `other` over `into`, mapping by mapping."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def build(default: T, raw: Any, where: str, problems: list[str]) -> T:
    """`default` (a section) with the values of `raw`; what does not fit is added to `problems`."""
    if raw is None:
        return default
    if not isinstance(raw, dict):
        problems.append(f"{where} = {raw!r}: expected a section of keys, found {type(raw).__name__}")
        return default
    hints = get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            problems.append(f"{name}: no such key; {nearest_key(name)}")
        elif is_dataclass(getattr(default, key)):
            changes[key] = build(getattr(default, key), value, name, problems)
        elif value is not None and (section := optional_section(hints[key])) is not None:
            changes[key] = build(section(), value, name, problems)
        else:
            try:
                changes[key] = coerce(value, hints[key])
            except TypeError:
                problems.append(f"{name} = {value!r}: expected {describe(hints[key])}")
    return replace(default, **changes)  # type: ignore[type-var]


def coerce(value: Any, kind: Any) -> Any:
    """`value` as `kind`, where nothing is lost by it ('1e-5' is a float, 4.0 an int, 'a' a tuple of one str).

    Raises TypeError otherwise.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any or (kind is type(None) and value is None):
        return value
    if origin in (Union, types.UnionType):
        for option in sorted(args, key=lambda option: option is not type(value)):
            try:
                return coerce(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) == len(kinds):
            return tuple(coerce(item, of) for item, of in zip(items, kinds, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return {coerce(key, args[0]): coerce(item, args[1]) for key, item in value.items()}
    elif kind in (bool, str):
        if isinstance(value, kind):
            return value
    elif kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        if kind is int and isinstance(value, int):
            return value
        try:
            number = float(value)
        except ValueError:
            raise TypeError(value) from None
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return number if kind is float else int(number)
    raise TypeError(value)


def config_to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
