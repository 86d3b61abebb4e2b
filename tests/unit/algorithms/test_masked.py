"""Masked statistics: numbers by hand, and nothing outside the mask counts."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf3d.algorithms.masked import (
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    zero_outside,
)

NAN, INF = math.nan, math.inf
X = torch.tensor([[1.0, 3.0, NAN], [5.0, INF, NAN], [NAN, NAN, NAN]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool()])
def test_numbers_by_hand(mask: torch.Tensor) -> None:
    assert masked_sum(X, mask).item() == 9.0
    assert masked_sum(X, mask, dim=-1).tolist() == [4.0, 5.0, 0.0]
    assert masked_mean(X, mask).item() == 3.0
    assert masked_mean(X, mask, dim=-1).tolist() == [2.0, 5.0, 0.0]
    assert masked_var(X, mask).item() == 4.0  # ((-2)² + 0² + 2²) / (3 - 1)
    whitened = masked_whiten(X, mask)
    assert torch.allclose(
        whitened, torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    )


def test_whitening_a_constant_gives_zero() -> None:
    assert masked_whiten(torch.full((2, 2), 0.5), torch.ones(2, 2)).abs().max() == 0


def test_no_gradient_from_outside() -> None:
    x = X.clone().requires_grad_()
    zero_outside(x, MASK).square().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 6.0, 0.0], [10.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("tokens", [0, 1])
def test_variance_needs_two_tokens(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} response token"):
        masked_whiten(torch.ones(1, 3), (torch.arange(3) < tokens)[None])
