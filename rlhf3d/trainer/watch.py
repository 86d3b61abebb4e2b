"""What a run says when its numbers look wrong: not finite, spiking gradients, nothing to learn from.

Invariant: it reports and never changes a number; what it remembers between steps is in the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.algorithms.health import SpikeMonitor, nonfinite_rows
from rlhf3d.batching.batch import Batch
from rlhf3d.trainer.experience import Scored

ROLES = ("actor", "critic")
_SHOWN = 5


class Watch:
    """Looks at each step; `say` puts a line before the user."""

    def __init__(
        self, say: Callable[[str], None], on_nonfinite: str, grad_spike_factor: float
    ) -> None:
        self._say = say
        self._stop = on_nonfinite == "stop"
        self._factor = grad_spike_factor
        self._spikes = {role: SpikeMonitor() for role in ROLES}
        self._without_signal = 0

    def scores(self, step: int, scored: Scored, n: int) -> None:
        """Say so when no group of n differs in reward (of single completions: when all are equal)."""
        size = n if n > 1 else len(scored.scores)
        if bool(groups_with_signal(scored.rewards, scored.written, size).any()):
            self._without_signal = 0
            return
        self._without_signal += 1
        what = (
            f"all {len(scored.scores) // n} groups of {n} have"
            if n > 1
            else f"all {size} completions have"
        )
        rewards = scored.rewards
        self._tell(
            f"step {step}: {what} equal rewards (between {rewards.min():g} and {rewards.max():g}), so there is "
            f"nothing to tell good from bad by; {self._without_signal} such step(s) in a row. Check the reward "
            "function on samples/, use easier or harder prompts, or raise rollout.n"
        )

    def batch(self, step: int, batch: Batch) -> None:
        """Numbers that the update would be fed with: RuntimeError when some are not finite and the run is to stop."""
        mask = batch["response_mask"]
        columns = {
            name: column for name, column in batch.columns.items() if column.shape == mask.shape
        }
        broken = nonfinite_rows(columns, mask)
        if not broken:
            return
        rows = "; ".join(
            f"sequence {row} ({', '.join(names)})" for row, names in list(broken.items())[:_SHOWN]
        )
        text = (
            f"step {step}: numbers of {len(broken)} of {len(batch)} sequences are not finite: {rows}. "
            f"Sequence k is line k + 1 of samples/step_{step}.jsonl"
        )
        if self._stop:
            raise RuntimeError(
                f"{text}. trainer.on_nonfinite=skip leaves out the optimizer steps that hold them"
            )
        self._tell(text)

    def update(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """`ROLE/grad_norm_ratio`, to the median of the steps before; spikes and steps left out are said."""
        found = {}
        for role in ROLES:
            if skipped := metrics.get(f"{role}/skipped_steps"):
                self._tell(
                    f"step {step}: {skipped:.0f} optimizer step(s) of the {role} left out; why: logs/driver.log"
                )
            norm = metrics.get(f"{role}/grad_norm")
            if norm is None:
                continue
            ratio = found[f"{role}/grad_norm_ratio"] = self._spikes[role].ratio(norm)
            if ratio > self._factor:
                self._tell(
                    f"step {step}: gradient norm of the {role} {norm:.3g}, {ratio:.1f} times its usual size"
                )
        return found

    def _tell(self, text: str) -> None:
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
