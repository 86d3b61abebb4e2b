"""Patch `clip_in_place`: gradients are scaled where they are.

Invariant: the numbers are upstream's, bit by bit; clipping allocates nothing. Upstream's stand-in
for the kernels of Transformer Engine and Apex makes a scaled copy of each gradient and copies it
back. Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

from typing import Any

from megatron_patches.patch import Patch, Target

_UTILS = "megatron.core.utils"


def _has_stand_in() -> bool:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    return clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale


def _apply() -> None:
    import torch
    from megatron.core.optimizer import clip_grads

    def scale(_chunk_size: int, _overflow: Any, tensor_lists: Any, factor: float) -> None:
        for source, target in zip(*tensor_lists, strict=True):
            torch.mul(source, factor, out=target)

    clip_grads.multi_tensor_scale_impl = scale


PATCH = Patch(
    name="clip_in_place",
    versions=">=0.16,<0.20",
    reason="clipping writes every gradient twice, once into new memory",
    targets=(
        Target(f"{_UTILS}:local_multi_tensor_scale", "dst.copy_(src * scale)"),
        Target(
            "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
            "multi_tensor_scale_impl, dummy_overflow_buf",
        ),
    ),
    apply=_apply,
    needed=_has_stand_in,
)
