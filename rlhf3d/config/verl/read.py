"""A verl configuration as dotted keys: from its YAML, or from the overrides of a run script.

Invariant: a value that is not known here (a shell's, an interpolation that leads nowhere) is
named with its key, and never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf3d.config import scalars
from rlhf3d.config.load import read_sections
from rlhf3d.config.verl.shell import read_script

_OVERRIDE = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w@/-]*(?:\.[\w@/-]+)*)(?:=(.*))?", re.DOTALL)
_SELECT = re.compile(r"\$\{oc\.select:\s*([\w.]+)\s*(?:,([^${}]*))?\}|\$\{([\w.]+)\}")
_INTERPOLATIONS = 8
"""How deep an interpolation may lead to another."""
CONFIG_NAME = "--config-name"
"""Under this name stands the Hydra configuration that a script names."""


@dataclass
class Verl:
    """What a user gave verl."""

    values: dict[str, Any] = field(default_factory=dict)
    """By dotted key."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Keys whose value could not be known: what it needs."""
    notes: list[str] = field(default_factory=list)
    """What else the reader should know."""

    def get(self, *names: str) -> Any:
        """The first value that is given among several names."""
        given = (self.values.get(name) for name in names)
        return next((value for value in given if value is not None), None)

    @property
    def is_megatron(self) -> bool:
        """Whether verl's workers are Megatron's (its default is FSDP)."""
        named = self.get("actor_rollout_ref.actor.strategy", "model_engine")
        if named is not None:
            return bool(named == "megatron")
        if "megatron" in str(self.values.get(CONFIG_NAME, "")):
            return True
        return any(name.startswith("actor_rollout_ref.actor.megatron.") for name in self.values)


def read_verl(path: Path, overrides: Sequence[str], environment: Mapping[str, str]) -> Verl:
    """A YAML file or a run script, with overrides in verl's own names.

    `environment` has a script's variables. Raises ValueError.
    """
    if path.suffix in (".yaml", ".yml"):
        verl = Verl(dict(_flat(read_sections(path, "`actor_rollout_ref:`, `data:` …"), "")))
    else:
        verl = _from_script(path, environment)
    for text in overrides:
        if not _override(verl, text):
            raise ValueError(
                f"override {text!r}: expected a key of verl, such as trainer.nnodes=2 (variables "
                "of a script come from the environment)"
            )
    _interpolate(verl)
    # Hydra's mark for a value that must be given.
    verl.values = {key: None if value == "???" else value for key, value in verl.values.items()}
    return verl


def _from_script(path: Path, environment: Mapping[str, str]) -> Verl:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: give a YAML file or a run script") from None
    script = read_script(text, environment)
    if script is None:
        raise ValueError(
            f"{path}: no line calls verl (python3 -m verl.trainer.main_ppo key=value …); give "
            "such a script, or a configuration that ends in .yaml"
        )
    verl = Verl(unknown=script.unknown)
    for name, value in script.conditional.items():
        verl.notes.append(f"{name} is set in an if or a loop, which are not evaluated: {value!r}")
    for word in script.arguments:
        _argument(verl, word)
    return verl


def _argument(verl: Verl, word: str) -> None:
    option, equals, value = word.partition("=")
    if option in ("--config-path", "--config-dir") and equals:
        verl.notes.append(f"the files below {value} are not read: verl's own defaults are taken")
    elif option == CONFIG_NAME and equals:
        verl.values[CONFIG_NAME] = value
    elif not word.startswith("-"):
        _override(verl, word)


def _override(verl: Verl, text: str) -> bool:
    """Apply one Hydra override; whether it is one."""
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        return False
    sign, key, value = match.groups()
    if sign == "~":
        verl.values.pop(key, None)
    elif value is None:
        return False
    else:
        verl.unknown.pop(key, None)
        verl.values.pop(key, None)
        verl.values |= dict(_flat(_value(value), key))
    return True


def _value(text: str) -> Any:
    try:
        return scalars.read(text)
    except (yaml.YAMLError, ValueError):
        return text


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key; a list is one value."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return
    try:
        yield prefix, scalars.as_anything(value)
    except TypeError:  # such as 0.5_2, which YAML 1.1 takes for 0.52
        yield prefix, str(value)


def _interpolate(verl: Verl) -> None:
    """Replace `${other.key}`, `${.sibling}` and `${oc.select:other.key,default}`."""
    for key, value in list(verl.values.items()):
        for _ in range(_INTERPOLATIONS):
            if not isinstance(value, str) or "${" not in value:
                break
            value = _once(verl, key, value)
        if isinstance(value, str) and "${" in value:
            del verl.values[key]
            verl.unknown[key] = value
        else:
            verl.values[key] = value


def _once(verl: Verl, key: str, text: str) -> Any:
    whole = _SELECT.fullmatch(text)
    if whole:
        return _target(verl, key, whole)
    return _SELECT.sub(lambda found: str(_target(verl, key, found)), text)


def _target(verl: Verl, key: str, match: re.Match[str]) -> Any:
    name, default, plain = match.groups()
    name = name or plain
    if name.startswith("."):
        name = key.rpartition(".")[0] + name
    if name in verl.values:
        return verl.values[name]
    if default is not None:
        return next(value for _, value in _flat(_value(default), "default"))
    # Left as it is, it is reported.
    return match[0] if plain else None
