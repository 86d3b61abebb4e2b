"""Completions of the same prompt: sums over a group, and whether it tells good from bad.

Invariant: an empty response takes no part in its group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(x: Tensor, group_ids: Tensor) -> Tensor:
    """For each row, the sum of `x` [N] over the rows with its number in `group_ids` [N]."""
    ids, index = torch.unique(group_ids, return_inverse=True)
    # `index` [N] is each row's place in `ids` [G]: sums [G], and then each row's own [N].
    return x.new_zeros(len(ids)).index_add(0, index, x)[index]


def groups_with_signal(values: Tensor, counted: Tensor, group_ids: Tensor) -> Tensor:
    """[G] whether a group's values differ, by ascending group id.

    Equal values give every group estimator advantages of 0: DAPO's dynamic sampling (arXiv
    2503.14476, eq. 11: 0 < number correct < n) keeps the groups with signal. `values` [N],
    `counted` [N] False for empty responses, `group_ids` [N] as in `AdvantageInputs`.
    """
    assert values.shape == counted.shape == group_ids.shape
    ids, index = torch.unique(group_ids, return_inverse=True)
    inside = counted.bool()
    index, values = index[inside], values[inside].double()
    # A group of empty responses alone keeps -inf as highest and inf as lowest: no signal.
    nothing = torch.full((len(ids),), torch.inf, dtype=torch.float64)
    highest = (-nothing).scatter_reduce(0, index, values, "amax")
    lowest = nothing.scatter_reduce(0, index, values, "amin")
    return highest > lowest
