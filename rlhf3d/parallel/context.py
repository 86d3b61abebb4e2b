"""Context parallelism: which positions of a sequence each rank of a context-parallel group holds.

Invariant: of 2·cp equal chunks of a sequence, rank r holds chunks r and 2·cp-1-r, as Megatron's
rotary embedding and Transformer Engine's attention expect: under a causal mask all ranks do the
same work.
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
    """Consecutive positions of one sequence of a run of sequences; it begins at `sequence`."""

    start: int
    stop: int
    sequence: int


def held_chunks(ends: Sequence[int], cp: int, rank: int) -> list[Chunk]:
    """Return the chunks of context-parallel rank `rank`, in its order.

    `ends` [b + 1] is where each sequence of a run starts and the last one ends; every length
    divides by 2·cp.
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
    """Return the positions [s / cp] of the run that the rank holds, in its order."""
    chunks = held_chunks(ends, cp, rank)
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])


def gathered_order(ends: Sequence[int], cp: int) -> Tensor:
    """Return where each position [s] of the run is once the ranks' shares are concatenated."""
    # The concatenation is a permutation of the positions; argsort inverts it.
    return torch.cat([held_positions(ends, cp, rank) for rank in range(cp)]).argsort()


def sum_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' shares, for a loss that every rank computes from all of them.

    Each rank gets the gradient of its own share: an all-reduce of gradients would count the loss
    once per rank.
    """
    return _SumShares.apply(share, group)


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        # all_reduce works in place, and the input belongs to the autograd graph.
        total = share.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
