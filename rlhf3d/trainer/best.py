"""The best validation so far, and the figure by which checkpoints are kept.

Invariant: higher is better, one metric a run, chosen at the first validation and kept over resumes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """Follows one metric."""

    def __init__(self, name: str | None) -> None:
        """`name`: trainer.best_metric; None for the first val-core/…/acc/… there is."""
        self.name, self._wanted = name, name
        self.value, self.step = -math.inf, 0

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """A validation's figures; ValueError where a metric was asked for that it does not have."""
        accuracies = [name for name in metrics if name.startswith("val-core/") and "/acc/" in name]
        if self.name is None:
            self.name = next(iter(accuracies), None)
        elif self._wanted is not None and self.name not in metrics:
            raise ValueError(
                f"trainer.best_metric = {self.name}: validation has {', '.join(sorted(metrics))}"
            )
        value = metrics.get(self.name, math.nan) if self.name else math.nan
        if value > self.value:
            self.value, self.step = value, step

    def of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metric among a step's figures, by name; empty where the step was not validated."""
        value = metrics.get(self.name, math.nan) if self.name else math.nan
        return {self.name: value} if self.name and math.isfinite(value) else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON."""
        return {"name": self.name, "value": self.value if self.step else None, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, unless another metric is asked for."""
        if self._wanted in (None, state["name"]) and state["value"] is not None:
            self.name, self.value, self.step = state["name"], state["value"], state["step"]
