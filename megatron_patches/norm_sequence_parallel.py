"""Patch `norm_sequence_parallel`: torch's RMSNorm may be used under sequence parallelism.

Invariant: a norm under sequence parallelism sees a part of the tokens, so its weights are marked
and `finalize_model_grads` sums their gradients over the tensor-parallel ranks. Versions 0.16 to
0.19 need it.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron_patches.patch import Patch, Target

_NEW = "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"


def _apply() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        # A copy: all layers share the config, and the others need its sequence_parallel.
        config = copy.copy(config)
        config.sequence_parallel = False
        norm = original(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = build


PATCH = Patch(
    name="norm_sequence_parallel",
    versions=">=0.16,<0.20",
    reason="without Apex or Transformer Engine, norms refuse sequence parallelism",
    targets=(Target(_NEW, "assert not config.sequence_parallel"),),
    apply=_apply,
)
