"""Patch `isend_alias`: a pipeline send keeps the memory it is sending.

Invariant: an activation is not freed before it is sent. The schedule swaps `.data` of an output for
an empty tensor while an overlapped send is in flight; gloo and NCCL hold that object until then, an
alias holds the storage. (NCCL of old marked the storage as used by its stream, which it no longer
does.) From 0.18 on the schedule itself waits for the send before it frees the output
(Megatron-LM#4047).
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.patch import Patch, Target

_MODULE = "megatron.core.pipeline_parallel.p2p_communication"


def _apply() -> None:
    from megatron.core.pipeline_parallel import p2p_communication

    def alias(tensor: Any) -> Any:
        # Another object with the same storage: swapping `.data` of the original leaves it alone.
        return None if tensor is None else tensor.detach()

    def wrap(send: Any) -> Any:
        @functools.wraps(send)
        def wrapped(*, tensor_send_prev: Any, tensor_send_next: Any, **kwargs: Any) -> Any:
            return send(
                tensor_send_prev=alias(tensor_send_prev),
                tensor_send_next=alias(tensor_send_next),
                **kwargs,
            )

        return wrapped

    for name in ("_p2p_ops", "_batched_p2p_ops"):
        setattr(p2p_communication, name, wrap(getattr(p2p_communication, name)))


PATCH = Patch(
    name="isend_alias",
    versions=">=0.16,<0.18",
    reason="silent corruption: a stage may send an activation that the schedule has freed",
    targets=(
        Target(f"{_MODULE}:_p2p_ops", "tensor=tensor_send_next"),
        Target(f"{_MODULE}:_batched_p2p_ops", "torch.distributed.isend, tensor_send_next"),
        Target("megatron.core.pipeline_parallel.schedules:deallocate_output_tensor", "out.data ="),
    ),
    apply=_apply,
    cpu_only=False,
)
