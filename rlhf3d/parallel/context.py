"""Context parallelism: which positions of its sequences each rank of a context-parallel group holds.

Invariant: a sequence of 2·cp equal chunks gives rank r chunks r and 2·cp-1-r, as Megatron's rotary embedding and
Transformer Engine's attention have it: under a causal mask all ranks do the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions of one sequence, which stands at `sequence` and after in its run of sequences."""

    start: int
    stop: int
    sequence: int


def held_chunks(ends: Sequence[int], cp: int, rank: int) -> list[Chunk]:
    """The chunks of context-parallel rank `rank`, in its order.

    `ends` [b + 1] is where each sequence of a run starts and the last one ends; every length divides by 2·cp.
    """
    if cp == 1:
        return [Chunk(start, stop, start) for start, stop in pairwise(ends)]
    held = []
    for start, stop in pairwise(ends):
        size, rest = divmod(stop - start, 2 * cp)
        assert rest == 0, f"a sequence of {stop - start} positions over 2 x {cp} chunks"
        for number in (rank, 2 * cp - 1 - rank):
            held.append(Chunk(start + number * size, start + (number + 1) * size, start))
    return held


def held_positions(ends: Sequence[int], cp: int, rank: int) -> Tensor:
    """[s / cp] positions of the run that the rank holds, in its order."""
    return torch.cat(
        [torch.arange(chunk.start, chunk.stop) for chunk in held_chunks(ends, cp, rank)]
    )


def gathered_order(ends: Sequence[int], cp: int) -> Tensor:
    """[s] where each position of the run stands when the ranks' shares are put one after the other."""
    return torch.cat([held_positions(ends, cp, rank) for rank in range(cp)]).argsort()


def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' shares, for a loss that every rank computes whole: each gets the gradient of its share."""
    return _SumShares.apply(share, group)


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = share.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
