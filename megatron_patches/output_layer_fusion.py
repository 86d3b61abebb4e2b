"""Patch `output_layer_fusion`: Megatron's own linear layers need no Apex.

Invariant: with `gradient_accumulation_fusion` and without Apex, Transformer Engine's layers add the
gradient of a weight to its fp32 sum within the product. Megatron's own, in Transformer Engine's
specs only the output layer (of which rlhf3d uses the weight alone), are built without the fusion
instead of refusing it. Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron_patches.patch import Patch, Target

_MODULE = "megatron.core.tensor_parallel.layers"


def _lacks_apex() -> bool:
    from megatron.core.tensor_parallel import layers

    return not layers._grad_accum_fusion_available


def _apply() -> None:
    from megatron.core.tensor_parallel import layers

    original = layers.ColumnParallelLinear.__init__

    @functools.wraps(original)
    def build(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        # A copy: all layers share the config, and those of Transformer Engine keep the fusion.
        config = copy.copy(config)
        config.gradient_accumulation_fusion = False
        original(self, *args, config=config, **kwargs)

    layers.ColumnParallelLinear.__init__ = build


PATCH = Patch(
    name="output_layer_fusion",
    versions=">=0.16,<0.20",
    reason="the output layer without Apex refuses Transformer Engine's fused gradient accumulation",
    targets=(
        Target(
            f"{_MODULE}:ColumnParallelLinear.__init__",
            "fusion and not _grad_accum_fusion_available",
        ),
        Target(
            f"{_MODULE}:ColumnParallelLinear.__init__",
            "self.gradient_accumulation_fusion = config.grad",
        ),
    ),
    apply=_apply,
    cpu_only=False,
    needed=_lacks_apex,
)
