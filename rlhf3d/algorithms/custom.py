"""A user's own file of estimators and losses (`algorithm.custom_path`).

    from rlhf3d.algorithms.advantages import AdvantageInputs, register_advantage
    from rlhf3d.algorithms.losses import PolicyLossTerms, register_policy_loss

Invariant: a file is executed once a process; after that its names are as good as the built-in ones.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.algorithms.losses import POLICY_LOSSES

_KEY = "algorithm.custom_path"
_LOADED: set[Path] = set()


def load_custom_algorithms(path: str | Path) -> None:
    """Execute the Python file, so that what it registers can be chosen.

    ValueError, with the key, when the file is missing, fails, or registers nothing.
    """
    file = Path(path).resolve()
    if file in _LOADED:
        return
    if not file.is_file():
        raise ValueError(f"{_KEY} = {path}: no such Python file")
    module_name = f"rlhf3d_custom_algorithms_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{_KEY} = {path}: not a Python file (*.py)")
    advantages, losses = ADVANTAGES.entries(), POLICY_LOSSES.entries()
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        if (ADVANTAGES.entries(), POLICY_LOSSES.entries()) == (advantages, losses):
            raise ValueError("it registers nothing; decorate a function with @register_advantage(name)")
    except Exception as error:
        ADVANTAGES.restore(advantages)
        POLICY_LOSSES.restore(losses)
        raise ValueError(f"{_KEY} = {path}: {type(error).__name__}: {error}") from error
    _LOADED.add(file)


def advantage_names(path: str | None) -> list[str]:
    """Estimators there are, those of the file `path` included."""
    if path is not None:
        load_custom_algorithms(path)
    return ADVANTAGES.names()


def policy_loss_names(path: str | None) -> list[str]:
    """Policy losses there are, those of the file `path` included."""
    if path is not None:
        load_custom_algorithms(path)
    return POLICY_LOSSES.names()


def custom_needs_values(path: str, estimator: str) -> bool:
    """Whether an estimator, of the file or built in, needs a critic; False for an unknown name."""
    return estimator in advantage_names(path) and ADVANTAGES[estimator].needs_values
