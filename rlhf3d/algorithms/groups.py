"""Completions of the same prompt: sums over a group, and whether it tells good from bad.

Invariant: an empty response takes no part in its group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(x: Tensor, group_ids: Tensor) -> Tensor:
    """For each row, the sum of `x` [N] over the rows with its number in `group_ids` [N]."""
    ids, index = torch.unique(group_ids, return_inverse=True)
    return x.new_zeros(len(ids)).index_add(0, index, x)[index]


def groups_with_signal(values: Tensor, counted: Tensor, n: int) -> Tensor:
    """[G] whether a group's values differ: equal ones give every group estimator advantages of 0.

    `values` [G * n], the n of a group side by side; `counted` [G * n] False for empty responses.
    DAPO's dynamic sampling (arXiv 2503.14476, eq. 11: 0 < number correct < n) keeps the groups with
    signal.
    """
    assert values.shape == counted.shape and len(values) % n == 0, (
        f"{tuple(values.shape)} in groups of {n}"
    )
    inside = counted.bool().view(-1, n)
    grouped = values.double().view(-1, n)
    highest = grouped.masked_fill(~inside, -torch.inf).amax(1)
    lowest = grouped.masked_fill(~inside, torch.inf).amin(1)
    return highest > lowest
