"""Patch `rng_tracker`: Megatron's named random states live in the CPU generator.

Invariant: `fork` draws from the named state and leaves the default one where it was, as on a GPU.
Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron_patches.patch import Patch, Target

_MODULE = "megatron.core.tensor_parallel.random"


def _apply() -> None:
    import torch
    from megatron.core.tensor_parallel import random

    def get_state(
        device: Any = "cpu", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # Upstream warns when a region meant for the GPU generator moves the CPU generator: here they
    # are one.
    logging.getLogger(_MODULE).addFilter(
        lambda record: "CPU RNG state changed" not in str(record.msg)
    )


PATCH = Patch(
    name="rng_tracker",
    versions=">=0.16,<0.20",
    reason="the tracker reads and writes the state of a CUDA generator",
    targets=(
        Target(f"{_MODULE}:_get_cuda_rng_state", "torch.cuda.random.get_rng_state"),
        Target(f"{_MODULE}:_set_cuda_rng_state", "_lazy_call(cb)"),
        Target(f"{_MODULE}:CudaRNGStatesTracker.fork", "_set_cuda_rng_state(self.states_[name]"),
    ),
    apply=_apply,
)
