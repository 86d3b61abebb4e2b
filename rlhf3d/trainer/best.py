"""The best validation so far, and the figure by which checkpoints are kept.

Invariant: higher is better; a run has one such metric, chosen at the first validation and kept when
it is resumed.
Runs in: driver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class BestTracker:
    """Follows one metric."""

    def __init__(self, name: str | None) -> None:
        """`name`: trainer.best_metric; None for the first val-core/…/acc/… there is."""
        self.name = self._wanted = name
        self.value = -math.inf
        self.step = 0
        """At which `value` was measured; 0 also before the first validation."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a validation's metrics; ValueError where they lack the metric that was asked for."""
        if self.name is None:
            self.name = next(filter(_is_accuracy, metrics), None)
        elif self._wanted is not None and self.name not in metrics:
            raise ValueError(
                f"trainer.best_metric = {self.name}: validation has {', '.join(sorted(metrics))}"
            )
        for value in self.of(metrics).values():
            if value > self.value:
                self.value, self.step = value, step

    def of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metric among a step's, by name; empty where the step was not validated."""
        if self.name is None or not math.isfinite(metrics.get(self.name, math.nan)):
            return {}
        return {self.name: metrics[self.name]}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON."""
        # JSON has no -inf, which is the value before the first validation.
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "value": value, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`, unless another metric is asked for."""
        if self._wanted in (None, state["name"]) and state["value"] is not None:
            self.name, self.value, self.step = state["name"], state["value"], state["step"]


def _is_accuracy(name: str) -> bool:
    return name.startswith("val-core/") and "/acc/" in name
