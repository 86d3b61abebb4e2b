"""Patch `moe_split_sizes`: split sizes of the experts' all-to-all become host numbers on CPU too.

Invariant: where upstream asks for a numpy array it gets one, whatever device the tensor was on.
Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

from typing import Any

from megatron_patches.patch import Patch, Target


def _apply() -> None:
    import torch
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    # It imports the function by name, so its own reference has to be replaced too.
    token_dispatcher.maybe_move_tensor_to_cpu = to_host


PATCH = Patch(
    name="moe_split_sizes",
    versions=">=0.16,<0.20",
    reason="all_to_all_single gets tensors as split sizes: TypeError in expert parallelism",
    targets=(
        Target(
            "megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu", "tensor.is_cuda"
        ),
        Target("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu,"),
    ),
    apply=_apply,
)
