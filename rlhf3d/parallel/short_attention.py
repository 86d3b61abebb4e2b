"""Attention of short sequences in bfloat16 on CPU, whose backward pass computes in fp32.

Invariant: the forward pass is torch's own, bit by bit; gradients are nearer to the exact ones than
torch's. Its backward kernel for bfloat16 multiplies blocks that are too small for the processor's
bfloat16 units while there are few queries; the one for fp32 then takes 0.4 to 0.9 of its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEYS = 384
"""Tokens at most: with 512 the kernel for fp32 takes longer."""
QUERIES = 767
"""Tokens at most: from 768 on torch's kernel takes larger blocks."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class ShortAttention(torch.autograd.Function):
    """Causal attention: queries [b, h, s, d], keys and values [b, g, s, d] -> [b, h, s, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """What `scaled_dot_product_attention` calls."""
        out: Tensor
        out, log_z = _attend(query, key, value, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, out, log_z)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients, rounded to the dtype of the inputs."""
        grads = attend_backward(grad, *ctx.saved_tensors, causal=True, scale=ctx.scale)
        return (*(each.to(grad.dtype) for each in grads), None)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_z: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [b, h, q, d], keys and values [b, g, k, d].

    They are in fp32 where that is the faster way, in the dtype of the inputs elsewhere.
    """
    tensors = [grad, query, key, value, out]
    short = query.shape[2] <= QUERIES and key.shape[2] <= KEYS
    if short and query.dtype == torch.bfloat16:
        tensors = [tensor.float() for tensor in tensors]
    found: tuple[Tensor, Tensor, Tensor] = _attend_backward(
        *tensors, log_z, 0.0, causal, scale=scale
    )
    return found
