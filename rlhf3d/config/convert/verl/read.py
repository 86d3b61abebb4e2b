"""A verl configuration as dotted keys: from its YAML, or from the overrides of a run script.

Invariant: nothing is executed, and what is given last is what holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf3d.config.convert.given import Given, flat, read_text
from rlhf3d.config.convert.shell import read_script
from rlhf3d.config.load import read_sections

_MAIN = re.compile(r"(.*[./])?main_\w+(\.py)?")
CONFIG_NAME = "--config-name"
"""Under this name stands the Hydra configuration that a script names."""


@dataclass
class Verl(Given):
    """What a user gave verl."""

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
        verl = Verl(dict(flat(read_sections(path, "`actor_rollout_ref:`, `data:` …"))))
    else:
        verl = _from_script(path, environment)
    verl.complete(
        overrides,
        "a key of verl, such as trainer.nnodes=2 (variables of a script come from the environment)",
    )
    return verl


def _from_script(path: Path, environment: Mapping[str, str]) -> Verl:
    text = read_text(path, "a YAML file or a run script")
    script = read_script(text, environment, calls_verl)
    if script is None:
        raise ValueError(
            f"{path}: no line calls verl (python3 -m verl.trainer.main_ppo key=value …); give "
            "such a script, or a configuration that ends in .yaml"
        )
    verl = Verl(unknown=script.unknown, notes=script.notes())
    for word in script.arguments:
        _argument(verl, word)
    return verl


def calls_verl(words: Sequence[str]) -> int | None:
    """Where a line names `main_ppo` or a recipe's main."""
    return next((at for at, word in enumerate(words) if _MAIN.fullmatch(word)), None)


def _argument(verl: Verl, word: str) -> None:
    option, equals, value = word.partition("=")
    if option in ("--config-path", "--config-dir") and equals:
        verl.notes.append(f"the files below {value} are not read: verl's own defaults are taken")
    elif option == CONFIG_NAME and equals:
        verl.values[CONFIG_NAME] = value
    elif not word.startswith("-"):
        verl.override(word)
