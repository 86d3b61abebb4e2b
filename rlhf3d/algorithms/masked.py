"""Sums, means, variances and whitening over the masked-in elements of a tensor.

Invariant: what lies outside the mask, NaN and infinity included, changes no value and no gradient.
Masks are bool or 0/1 float, of the shape of the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf3d.units import counted

_ROWS = 64
"""Rows at a time, whose temporary tensors stay in the processor's cache."""


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with 0 outside `mask`; no gradient flows there."""
    assert x.shape == mask.shape, f"data {tuple(x.shape)} and mask {tuple(mask.shape)} differ"
    # Not x * mask: NaN * 0 is NaN, in the value and in the gradient.
    return torch.where(mask if mask.dtype == torch.bool else mask != 0, x, 0)


def by_rows(function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """`function` of columns [N, R], which gives a number a row, on some rows at a time.

    For functions with temporary tensors: of all rows of a large batch these would be slow.
    """
    parts = zip(*(column.split(_ROWS) for column in columns), strict=True)
    return torch.cat([function(*part) for part in parts])


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` inside `mask`, over everything or along `dim`."""
    kept = zero_outside(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` inside `mask`, over everything or along `dim`; 0 where the mask is empty."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Bessel-corrected variance of `x` inside `mask`.

    ValueError with fewer than two elements there.
    """
    count = int(mask.bool().sum())
    if count < 2:
        raise ValueError(
            f"the batch has {counted(count, 'response token')}, a variance needs two: "
            "raise data.train_batch_size or data.max_response_length"
        )
    return masked_sum((x - masked_mean(x, mask)).square(), mask) / (count - 1)


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the complete batch inside `mask`, 0 outside.

    Errors as `masked_var`.
    """
    # 1e-8: values that are all equal whiten to 0, not NaN.
    return zero_outside((x - masked_mean(x, mask)) * (masked_var(x, mask) + 1e-8).rsqrt(), mask)
