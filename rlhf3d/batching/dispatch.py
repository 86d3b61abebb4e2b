"""Who computes which rows: a batch cut over data-parallel ranks, mini-batches and micro-batches.

Invariant: each row goes to exactly one data-parallel rank, once a pass; the cut never enters the mathematics.
Pure: rows and numbers, no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf3d.algorithms.aggregation import LossNorm, loss_norm
from rlhf3d.batching.balance import micro_batches, split_rows
from rlhf3d.batching.batch import Batch
from rlhf3d.config.derived import UpdatePlan
from rlhf3d.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step on one data-parallel rank."""

    micro_batches: list[list[int]]
    """Rows of the rank's shard, by micro-batch."""
    norm: LossNorm
    """Counts of the whole mini-batch, over all data-parallel ranks."""


@dataclass(frozen=True)
class ForwardShare:
    """What one data-parallel rank computes of a forward pass."""

    rows: list[int]
    """Rows of the batch, in the order of the rank's shard."""
    micro_batches: list[list[int]]
    """Rows of the shard, by micro-batch."""


@dataclass(frozen=True)
class UpdateShare:
    """What one data-parallel rank computes of an update."""

    rows: list[int]
    """Rows of the batch, in the order of the rank's shard."""
    mini_batches: list[MiniBatch]
    """Optimizer steps in order, epochs unrolled."""


def _cut(lengths: Sequence[int], rows: Sequence[int], size: int, layout: ParallelLayout) -> list[list[int]]:
    # The interleaved schedule wants a multiple of the pipeline stages.
    return micro_batches(lengths, rows, size, multiple_of=layout.pp if layout.vpp > 1 else 1)


def split_forward(batch: Batch, micro_batch_size: int, layout: ParallelLayout) -> list[ForwardShare]:
    """Shares of a forward pass, by data-parallel rank."""
    lengths = batch.lengths()
    return [
        ForwardShare(rows, _cut([lengths[r] for r in rows], range(len(rows)), micro_batch_size, layout))
        for rows in split_rows(lengths, layout.dp)
    ]


def split_update(batch: Batch, plan: UpdatePlan, layout: ParallelLayout, max_response_tokens: int) -> list[UpdateShare]:
    """Shares of an update, by data-parallel rank; mini-batches are runs of consecutive rows, so groups stay whole."""
    lengths = batch.lengths()
    rows_of: list[list[int]] = [[] for _ in range(layout.dp)]
    minis_of: list[list[MiniBatch]] = [[] for _ in range(layout.dp)]
    for start in range(0, len(batch), plan.sequences_per_mini_batch):
        rows = list(range(start, min(start + plan.sequences_per_mini_batch, len(batch))))
        norm = loss_norm(batch["response_mask"][rows], max_response_tokens)
        for dp, part in enumerate(split_rows([lengths[r] for r in rows], layout.dp)):
            first = len(rows_of[dp])
            rows_of[dp] += [rows[i] for i in part]
            shard_lengths = [lengths[r] for r in rows_of[dp]]
            micro = _cut(shard_lengths, range(first, len(rows_of[dp])), plan.micro_batch_size, layout)
            minis_of[dp].append(MiniBatch(micro, norm))
    return [UpdateShare(rows, minis * plan.epochs) for rows, minis in zip(rows_of, minis_of, strict=True)]
