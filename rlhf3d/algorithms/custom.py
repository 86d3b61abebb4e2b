"""A user's own file of estimators and losses (`algorithm.custom_path`).

    from rlhf3d.algorithms.advantages import AdvantageInputs, register_advantage
    from rlhf3d.algorithms.losses import PolicyLossTerms, register_policy_loss

Invariant: a file is executed once per process; after that its names are as good as the built-in
ones.
"""

from __future__ import annotations

from pathlib import Path

from rlhf3d.algorithms.advantages import ADVANTAGES
from rlhf3d.algorithms.losses import POLICY_LOSSES
from rlhf3d.user_code import load_file

_KEY = "algorithm.custom_path"
_LOADED: set[Path] = set()


def load_custom_algorithms(path: str | Path) -> None:
    """Execute the Python file, so that what it registers can be chosen.

    ValueError, with the key, when the file is missing, fails, or registers nothing.
    """
    file = Path(path).resolve()
    # Executed again, its decorators would find their names taken.
    if file in _LOADED:
        return
    # Copies: to see whether the file adds anything, and to take that back where it fails half-way.
    advantages, losses = ADVANTAGES.entries(), POLICY_LOSSES.entries()
    try:
        load_file(file, _KEY)
        if (ADVANTAGES.entries(), POLICY_LOSSES.entries()) == (advantages, losses):
            raise ValueError(
                f"{_KEY}: {file} registers nothing; decorate a function with "
                "@register_advantage(name)"
            )
    # `load_file` turns whatever the file raises into ValueError.
    except ValueError:
        ADVANTAGES.restore(advantages)
        POLICY_LOSSES.restore(losses)
        raise
    _LOADED.add(file)
