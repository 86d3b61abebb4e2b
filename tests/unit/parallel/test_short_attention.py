"""Attention whose backward pass is in fp32: torch's own outputs, and gradients nearer to exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf3d.parallel.short_attention import ShortAttention

SCALE = 0.2


def gradients(inputs: tuple[Tensor, ...], grad: Tensor, ours: bool) -> tuple[Tensor, ...]:
    """Output and gradients, ours or torch's, in the dtype of the inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    if ours:
        out = ShortAttention.apply(*leaves, SCALE)
    else:
        out = scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def test_output_is_torchs_and_gradients_are_nearer_to_exact() -> None:
    torch.manual_seed(0)
    # [s, b, heads, d], as Megatron has them.
    shapes = [(33, 2, heads, 16) for heads in (6, 2, 2, 6)]
    drawn = [torch.randn(shape).bfloat16().permute(1, 2, 0, 3) for shape in shapes]
    inputs, grad = tuple(drawn[:3]), drawn[3]
    exact = gradients(tuple(tensor.double() for tensor in inputs), grad, ours=False)
    ours, theirs = (gradients(inputs, grad, ours=ours) for ours in (True, False))
    assert torch.equal(ours[0], theirs[0])
    for mine, other, right in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        error = (mine - right).norm() / right.norm()
        assert error < 3e-3 and error < (other - right).norm() / right.norm()
