"""Aggregation: numbers by hand, and the shares of any split add up to the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.algorithms.aggregation import AGGREGATION_MODES, LossNorm, aggregate, loss_norm

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [6.0, math.nan, math.nan], [math.nan] * 3])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_norm_counts_non_empty_sequences() -> None:
    assert loss_norm(MASK, 5) == LossNorm(tokens=4.0, sequences=2.0, max_response_tokens=5)
    with pytest.raises(ValueError, match="without response tokens"):
        loss_norm(torch.zeros(2, 3), 5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 12 / 4),
        ("token-sum", 6 + 6),
        ("seq-mean-token-sum", (6 + 6) / 2),
        ("seq-mean-token-mean", (2 + 6) / 2),
        ("seq-mean-token-sum-norm", (6 + 6) / 2 / 5),
    ],
)
def test_numbers_by_hand(mode: str, expected: float) -> None:
    assert aggregate(LOSSES, MASK, mode, loss_norm(MASK, 5)).item() == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(AGGREGATION_MODES),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_shares_of_any_split_sum_to_the_whole(mode: str, seed: int, assignment: list[int]) -> None:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, 5, generator=rng) < 0.5
    mask[0, 0] = True
    losses = torch.randn(8, 5, generator=rng, dtype=torch.float64).requires_grad_()
    norm = loss_norm(mask, 5)
    whole = aggregate(losses, mask, mode, norm)
    rows = [
        torch.tensor([i for i, part in enumerate(assignment) if part == p], dtype=torch.long)
        for p in range(4)
    ]
    total = torch.stack([aggregate(losses[part], mask[part], mode, norm) for part in rows]).sum()
    assert total.item() == pytest.approx(whole.item(), rel=1e-12, abs=1e-12)
    gradients = [torch.autograd.grad(loss, losses)[0] for loss in (whole, total)]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-14)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_padding_width_does_not_matter(mode: str) -> None:
    wide = torch.nn.functional.pad(LOSSES, (0, 4), value=math.nan)
    wide_mask = torch.nn.functional.pad(MASK, (0, 4))
    narrow = aggregate(LOSSES, MASK, mode, loss_norm(MASK, 9))
    assert aggregate(wide, wide_mask, mode, loss_norm(wide_mask, 9)).item() == narrow.item()


def test_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'token-mean'"):
        aggregate(LOSSES, MASK, "token_mean", loss_norm(MASK, 5))
