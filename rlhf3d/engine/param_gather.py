"""Weights gathered over replicas behind the next mini-batch's forward pass, instead of before it.

Invariant: a weight is whole before anything reads it: while `pending`, a module waits for its own in Megatron's
pre-hook and a reader that is no module calls `wait_for`; outside of an update nothing is pending and no hook is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class ParamGather:
    """The gathers of one engine's models, which are Megatron's DistributedDataParallel with overlap_param_gather."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._models = models
        self._pending = False
        for model in models:
            model.disable_forward_pre_hook(param_sync=False)

    def stepped(self) -> None:
        """The optimizer has changed each replica's share: the next forward pass gathers, or else `finish`."""
        if self._pending or not self._models:
            return
        for model in self._models:
            model.enable_forward_pre_hook()
        self._pending = True

    def wait_for(self, weight: Tensor) -> None:
        """Have a weight of the last model chunk whole, which something else than its own module's forward reads."""
        if self._pending:
            self._models[-1].param_to_bucket_group[weight].finish_param_sync()

    def finish(self) -> None:
        """Have every weight whole, and leave it to its readers."""
        if self._pending:
            for model in self._models:
                model.disable_forward_pre_hook(param_sync=True)
        self._pending = False
