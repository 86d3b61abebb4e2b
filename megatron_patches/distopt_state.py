"""Patch `distopt_state`: the distributed optimizer with torch's Adam can be saved and loaded at any step.

Invariant: state exists (as zeros, step 0) whenever it is asked for, and loading writes exactly the parameter
and its moments; `step` comes with the parameter groups.
"""

from __future__ import annotations

from typing import Any

from megatron_patches.patch import Patch, Target

_CLASS = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def uses_torch_adam() -> bool:
    """Neither Transformer Engine nor Apex supplies the optimizer of this installation."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


def _apply() -> None:
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original_state_dict = DistributedOptimizer.state_dict
    original_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        inner = self.optimizer
        if not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
        return original_state_dict(self)

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        original_set(self, model_param, {**tensors, "step": self.optimizer.state[main_param]["step"]})

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


PATCH = Patch(
    name="distopt_state",
    versions=">=0.16,<0.20",
    reason="with torch's Adam, saving before the first step and loading fp32 parameters fail",
    targets=(
        Target(f"{_CLASS}.state_dict", 'steps = list(set([s["step"].item()'),
        Target(f"{_CLASS}._set_main_param_and_optimizer_states", "dst_tensors[key].copy_(tensors[key])"),
    ),
    apply=_apply,
    cpu_only=False,
    needed=uses_torch_adam,
)
