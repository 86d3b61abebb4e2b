"""Patch `distopt_step`: after a load each parameter counts its own Adam steps.

Invariant: one optimizer step after a resume advances every `step` by one. Upstream gives all parameters the
same tensor, which torch's Adam then increments once a parameter: bias correction is wrong from there on.
"""

from __future__ import annotations

from typing import Any

from megatron_patches.distopt_state import uses_torch_adam
from megatron_patches.patch import Patch, Target


def _apply() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_state_dict


PATCH = Patch(
    name="distopt_step",
    versions=">=0.16,<0.20",
    reason="silent corruption: after a resume all parameters share one Adam step counter",
    targets=(
        Target(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            's["step"] = step',
        ),
    ),
    apply=_apply,
    cpu_only=False,
    needed=uses_torch_adam,
)
