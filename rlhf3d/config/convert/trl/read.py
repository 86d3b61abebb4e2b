"""What GRPO of TRL was given: its YAML or JSON, a command line in a script, or a Python file.

Invariant: nothing is executed; a key that is not given has TRL's default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.config.convert.given import Given, flat, read_text, read_value
from rlhf3d.config.convert.shell import read_script
from rlhf3d.config.convert.trl.defaults import DEFAULTS, VERSION
from rlhf3d.config.convert.trl.program import read_program
from rlhf3d.config.load import read_sections

_LAUNCHER = {"nproc_per_node": "num_processes", "nnodes": "num_machines"}
"""torchrun's names of accelerate's."""
_FILES = ("config", "config_file", "accelerate_config")


@dataclass
class Trl(Given):
    """What a user gave TRL."""

    defaults = DEFAULTS


def read_trl(path: Path, overrides: Sequence[str], environment: Mapping[str, str]) -> Trl:
    """A file, with overrides in TRL's own names.

    `environment` has a script's variables. Raises ValueError.
    """
    trl = Trl(notes=[f"a key that is not given has the default of TRL {VERSION}"])
    if path.suffix in (".yaml", ".yml", ".json"):
        trl.values |= dict(flat(read_sections(path, "`learning_rate:`, `num_generations:` …")))
    else:
        text = read_text(path, "a YAML file, a Python file or a run script")
        if path.suffix == ".py":
            text = read_program(text, path, trl)
        if text:
            _command_line(trl, path, text, environment)
    trl.complete(
        overrides,
        "a key of TRL, such as num_generations=8 (variables of a script come from the environment)",
    )
    return trl


def _command_line(trl: Trl, path: Path, text: str, environment: Mapping[str, str]) -> None:
    """The first command in a text that trains with TRL."""
    script = read_script(text, environment, calls_trl)
    if script is None:
        raise ValueError(
            f"{path}: no line calls TRL (trl grpo --key value …, or accelerate launch FILE.py "
            "--key value …), and no GRPOConfig is made; give such a file, or a YAML"
        )
    trl.notes += script.notes()
    launcher = dict(_options(script.launcher))
    options = dict(_options(script.arguments))
    if not any("accelerate" in word or word == "trl" for word in script.launcher):
        # Started by python alone it is one process; torchrun says how many.
        trl.values.setdefault("num_processes", 1)
    for name in _FILES:
        named = options.pop(name, launcher.pop(name, None))
        if isinstance(named, str):
            _named_file(trl, path.parent, named)
    machines = launcher.get("nnodes", 1)
    for name, value in launcher.items():
        if name == "nproc_per_node" and isinstance(value, int) and isinstance(machines, int):
            value *= machines
        if _LAUNCHER.get(name, name) in ("num_processes", "num_machines"):
            trl.put(_LAUNCHER.get(name, name), value)
    for name, value in options.items():
        if isinstance(value, str) and "$" in value:
            trl.unknown[name] = value
        else:
            trl.put(name, value)


def calls_trl(words: Sequence[str]) -> int | None:
    """Where a line names `trl grpo`, or a Python file that is given options."""
    for at, word in enumerate(words):
        options = any(text.startswith("--") for text in words[at + 1 :])
        by_name = word == "trl.scripts.grpo" or words[max(at - 1, 0) : at + 1] == ["trl", "grpo"]
        if options and (by_name or re.fullmatch(r"[^-].*\.py", word)):
            return at
    return None


def _named_file(trl: Trl, folder: Path, name: str) -> None:
    """TRL's YAML behind --config, or accelerate's behind --config_file."""
    found = [place / name for place in (folder, Path()) if (place / name).is_file()]
    if found:
        trl.values |= dict(flat(read_sections(found[0], "`learning_rate:` …")))
    else:
        trl.notes.append(f"{name}, which the command names, is not beside the file: not read")


def _options(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """`--key value`, `--key=value`, `--flag` and `--key value value` as names and values."""
    name, values = "", list[Any]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(read_value(word))
            continue
        if name:
            yield _option(name, values)
        name, equals, value = word.removeprefix("--").replace("\n", " ").partition("=")
        values = [read_value(value)] if equals else []


def _option(name: str, values: list[Any]) -> tuple[str, Any]:
    name = name.replace("-", "_")
    if values:
        return name, values[0] if len(values) == 1 else values
    if name.startswith("no_"):
        return name.removeprefix("no_"), False
    return name, True
