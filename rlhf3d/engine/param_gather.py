"""Weights gathered over replicas during the next mini-batch's forward pass, instead of before it.

Invariant: a weight is complete before anything reads it. While `pending`, a module waits for its
own in Megatron's pre-hook, and a reader that is no module calls `wait_for`; outside of an update
nothing is pending and there is no hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class ParamGather:
    """The gathers of one engine's models: Megatron's DDP with `overlap_param_gather`."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._models = models
        self._pending = False
        for model in models:
            # Megatron puts the hooks on when it builds the DDP; all weights are complete then.
            model.disable_forward_pre_hook(param_sync=False)

    def stepped(self) -> None:
        """Note that each replica's share changed: the next forward pass or `finish` gathers."""
        if self._pending or not self._models:
            return
        for model in self._models:
            model.enable_forward_pre_hook()
        self._pending = True

    def wait_for(self, weight: Tensor) -> None:
        """Wait for a weight of the last model chunk, for a reader other than its own module."""
        if self._pending:
            self._models[-1].param_to_bucket_group[weight].finish_param_sync()

    def finish(self) -> None:
        """Gather every weight, and take the hooks off."""
        if self._pending:
            for model in self._models:
                model.disable_forward_pre_hook(param_sync=True)
        self._pending = False
