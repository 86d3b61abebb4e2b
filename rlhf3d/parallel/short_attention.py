"""Attention of short sequences in bfloat16 on CPU, whose backward pass computes in fp32.

Invariant: the forward pass is torch's own, bit by bit; gradients are nearer to the exact ones than
torch's. Its backward kernel for bfloat16 multiplies blocks that are too small for the processor's
bfloat16 units: up to `SHORT` tokens the one for fp32 takes 0.5 to 0.8 of its time, from about 500
tokens on it takes longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHORT = 384
"""Tokens of a sequence at most."""


class ShortAttention(torch.autograd.Function):
    """Causal attention: queries [b, h, s, d], keys and values [b, g, s, d] -> [b, h, s, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """What `scaled_dot_product_attention` calls."""
        out: Tensor
        out, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, log_z)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients, rounded to the dtype of the inputs."""
        *tensors, log_z = ctx.saved_tensors
        wide = [tensor.float() for tensor in (grad, *tensors)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, log_z, 0.0, True, scale=ctx.scale
        )
        return (*(each.to(grad.dtype) for each in grads), None)
