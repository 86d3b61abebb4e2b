"""A GRPO recipe of NeMo-RL: its YAML over those that its `defaults:` name.

Invariant: nothing is executed; what stands nearer to the user's file wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf3d.config.convert.given import Given, Resolver, flat
from rlhf3d.config.load import read_sections

P = "policy."
TORCH = (P + "automodel_cfg.", P + "dtensor_cfg.")
"""The backend that is not Megatron: now, and before."""
MEGATRON = P + "megatron_cfg."
DEFAULTS: dict[str, Any] = {
    "loss_fn.ratio_clip_max": 0.2,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "loss_fn.reference_policy_kl_type": "k3",
    "loss_fn.token_level_loss": True,
    "cluster.gpus_per_node": 1,
    "cluster.num_nodes": 1,
}
"""NeMo-RL's, of the keys that have one there; most have none."""
RESOLVERS: dict[str, Resolver] = {
    "mul": lambda values: _number(values[0]) * _number(values[1]),
    "div": lambda values: _divided(_number(values[0]), _number(values[1])),
    "max": lambda values: max(map(_number, values)),
    "min": lambda values: min(map(_number, values)),
}


@dataclass
class Nemo(Given):
    """What a user gave NeMo-RL."""

    defaults = DEFAULTS

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron trains."""
        return bool(self.get(MEGATRON + "enabled"))

    def of_torch(self, name: str) -> Any:
        """A value of the other backend's section."""
        return self.get(*(section + name for section in TORCH))


def read_nemo_rl(path: Path, overrides: Sequence[str]) -> Nemo:
    """A YAML file, with overrides in NeMo-RL's own names. Raises ValueError."""
    nemo = Nemo(dict(flat(_merged(path, ()))))
    nemo.complete(overrides, "a key of NeMo-RL, such as cluster.num_nodes=2", RESOLVERS)
    return nemo


def _merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The sections of a file, laid over those of the files that its `defaults:` name."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: defaults: it derives from itself")
    own = read_sections(path, "`grpo:`, `policy:` …")
    named = own.pop("defaults", None) or []
    merged: dict[str, Any] = {}
    for name in named if isinstance(named, list) else [named]:
        base = path.parent / str(name)
        if not base.is_file():
            raise ValueError(
                f"{path}: defaults: {name}: {base} is not there; keep the recipe beside the files "
                "that it derives from, as in NeMo-RL's examples/configs"
            )
        _lay(_merged(base, (*seen, path.resolve())), merged)
    _lay(own, merged)
    return merged


def _lay(over: dict[str, Any], under: dict[str, Any]) -> None:
    """As OmegaConf merges: section by section; a list or a null takes the place of what was."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _lay(value, under[key])
        else:
            under[key] = value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return value


def _divided(value: Any, by: Any) -> Any:
    if by == 0:
        raise ValueError(by)
    return value // by if value % by == 0 else value / by
