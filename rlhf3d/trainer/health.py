"""Reports numbers that look wrong: not finite, spiking gradients, nothing to learn from.

Invariant: it never changes a number; what it remembers between steps is in the checkpoint.
Runs in: driver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.algorithms.health import SpikeMonitor, nonfinite_rows
from rlhf3d.batching.batch import Batch
from rlhf3d.experience.scored import Experience
from rlhf3d.units import counted

ROLES = ("actor", "critic")
_SHOWN = 5
"""Sequences that a message names."""


class HealthMonitor:
    """Looks at each step; `say` puts a line before the user."""

    def __init__(
        self, say: Callable[[str], None], on_nonfinite: str, grad_spike_factor: float
    ) -> None:
        """`on_nonfinite`, `grad_spike_factor`: the keys of the section trainer."""
        self._say = say
        self._stop = on_nonfinite == "stop"
        self._factor = grad_spike_factor
        self._spikes = {role: SpikeMonitor() for role in ROLES}
        self._without_signal = 0

    def check_rewards(self, step: int, experience: Experience) -> None:
        """Report a step in which no group's rewards differ (in groups of one: no two rewards)."""
        rewards, groups = experience.rewards, experience.group_ids
        if len(groups) < 2:  # a single completion is compared with none
            return
        count = len(groups.unique())
        single = count == len(groups)
        if single:  # compared with each other, as by the estimators that need no groups
            groups = torch.zeros_like(groups)
        if groups_with_signal(rewards, experience.written, groups).any():
            self._without_signal = 0
            return
        self._without_signal += 1
        what = f"all {len(rewards)} completions have"
        if not single:
            what = f"within each of the {count} groups all completions have"
        self._report(
            f"step {step}: {what} equal rewards (between {rewards.min():g} and {rewards.max():g}), "
            "so there is nothing to learn from; "
            f"{counted(self._without_signal, 'such step')} in a row. Check the reward function on "
            "samples/, use easier or harder prompts, or raise rollout.n"
        )

    def check_batch(self, step: int, batch: Batch) -> None:
        """Check the numbers that the update gets.

        RuntimeError when some are not finite and the run is to stop.
        """
        mask = batch["response_mask"]
        # The response-aligned columns [N, R], which the mask fits.
        columns = {
            name: column for name, column in batch.columns.items() if column.shape == mask.shape
        }
        # Rows of a trajectory have the number of its one line in samples/.
        numbers = batch.columns.get("sequence", torch.arange(len(batch))).tolist()
        broken: dict[int, dict[str, None]] = {}
        for row, names in nonfinite_rows(columns, mask).items():
            broken.setdefault(numbers[row], {}).update(dict.fromkeys(names))
        if not broken:
            return
        first = islice(broken.items(), _SHOWN)
        shown = "; ".join(f"sequence {number} ({', '.join(names)})" for number, names in first)
        text = (
            f"step {step}: numbers of {len(broken)} of {len(set(numbers))} sequences are not "
            f"finite: {shown}. Sequence k is line k + 1 of samples/step_{step}.jsonl"
        )
        if self._stop:
            raise RuntimeError(
                f"{text}. trainer.on_nonfinite=skip leaves out the optimizer steps that hold them"
            )
        self._report(text)

    def check_update(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """`ROLE/grad_norm_ratio`, to the median of the steps before; reports spikes."""
        ratios = {}
        for role in ROLES:
            if skipped := metrics.get(f"{role}/skipped_steps"):
                self._report(
                    f"step {step}: {counted(round(skipped), 'optimizer step')} of the {role} left "
                    "out; why: logs/driver.log"
                )
            norm = metrics.get(f"{role}/grad_norm")
            if norm is None:
                continue
            ratio = self._spikes[role].ratio(norm)
            ratios[f"{role}/grad_norm_ratio"] = ratio
            # False while too few steps are known: the ratio is NaN then.
            if ratio > self._factor:
                self._report(
                    f"step {step}: gradient norm of the {role} {norm:.3g}, {ratio:.1f} times its "
                    "usual size"
                )
        return ratios

    def _report(self, text: str) -> None:
        logging.getLogger(__name__).warning(text)
        self._say(text)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as JSON."""
        norms = {role: monitor.state_dict() for role, monitor in self._spikes.items()}
        return {"grad_norms": norms, "without_signal": self._without_signal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for role, norms in state["grad_norms"].items():
            self._spikes[role].load_state_dict(norms)
        self._without_signal = state["without_signal"]
