"""Who computes which rows: a batch cut over data-parallel ranks, mini-batches and micro-batches.

Invariant: each row goes to exactly one data-parallel rank, once a pass; mini-batches are the rows as the loop dealt
them; every rank of a pass has the same number of micro-batches; and the cut never enters the mathematics.
Pure: rows and numbers, no processes. Whole plans are made here, before a pass starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf3d.algorithms.aggregation import LossNorm, loss_norm
from rlhf3d.batching.balance import SequenceCost, split_rows
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import MicroBatching, UpdatePlan, plan_micro_batches
from rlhf3d.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step on one data-parallel rank."""

    micro_batches: list[list[int]]
    """Rows of the rank's shard, by micro-batch; an empty one is a filler."""
    norm: LossNorm
    """Counts of the whole mini-batch, over all data-parallel ranks."""


@dataclass(frozen=True)
class ForwardShare:
    """What one data-parallel rank computes of a forward pass."""

    rows: list[int]
    """Rows of the batch, in the order of the rank's shard."""
    micro_batches: list[list[int]]
    """Rows of the shard, by micro-batch; an empty one is a filler."""
    positions: int
    """Token positions of the pass, padding and fillers included."""


@dataclass(frozen=True)
class UpdateShare:
    """What one data-parallel rank computes of an update."""

    rows: list[int]
    """Rows of the batch, in the order of the rank's shard."""
    mini_batches: list[MiniBatch]
    """Optimizer steps in order, epochs unrolled."""
    positions: int
    """Token positions of one epoch, padding and fillers included."""


@dataclass
class _Shard:
    """What one data-parallel rank has been given so far."""

    rows: list[int]
    positions: int = 0

    def add(
        self, micro_batches: list[list[int]], lengths: Sequence[int], rule: MicroBatching
    ) -> list[list[int]]:
        """Append the rows of these micro-batches (numbers in the batch); the same by their numbers in the shard."""
        self.positions += sum(
            rule.positions([lengths[row] for row in rows]) for rows in micro_batches
        )
        here = []
        for rows in micro_batches:
            here.append(list(range(len(self.rows), len(self.rows) + len(rows))))
            self.rows += rows
        return here


def _cut(
    lengths: Sequence[int],
    rows: Sequence[int],
    rule: MicroBatching,
    layout: ParallelLayout,
    cost: SequenceCost,
) -> list[list[list[int]]]:
    """Micro-batches of `rows`, by data-parallel rank: a budget lets ranks have unequal numbers of rows."""
    parts = split_rows(
        [cost(lengths[row]) for row in rows], layout.dp, equal_counts=rule.tokens is None
    )
    # The interleaved schedule wants a multiple of the pipeline stages.
    multiple = layout.pp if layout.vpp > 1 else 1
    return plan_micro_batches(lengths, [[rows[i] for i in part] for part in parts], rule, multiple)


def split_forward(
    batch: Batch, rule: MicroBatching, layout: ParallelLayout, cost: SequenceCost
) -> list[ForwardShare]:
    """Shares of a forward pass, by data-parallel rank; ValueError for a sequence over the token budget."""
    lengths = batch.lengths()
    shares = []
    for micro_batches in _cut(lengths, range(len(batch)), rule, layout, cost):
        shard = _Shard([])
        here = shard.add(micro_batches, lengths, rule)
        shares.append(ForwardShare(shard.rows, here, shard.positions))
    return shares


def split_update(
    batch: Batch,
    plan: UpdatePlan,
    layout: ParallelLayout,
    max_response_tokens: int,
    cost: SequenceCost,
) -> list[UpdateShare]:
    """Shares of an update, by data-parallel rank; ValueError for a sequence over the token budget.

    Mini-batches are runs of consecutive rows, so groups stay whole and lengths stay mixed; the last may be smaller.
    """
    lengths, rule = batch.lengths(), plan.micro_batching
    shards = [_Shard([]) for _ in range(layout.dp)]
    minis_of: list[list[MiniBatch]] = [[] for _ in range(layout.dp)]
    for start in range(0, len(batch), plan.sequences_per_mini_batch):
        rows = range(start, min(start + plan.sequences_per_mini_batch, len(batch)))
        norm = loss_norm(batch["response_mask"][start : rows.stop], max_response_tokens)
        cut = _cut(lengths, rows, rule, layout, cost)
        for shard, minis, micro_batches in zip(shards, minis_of, cut, strict=True):
            minis.append(MiniBatch(shard.add(micro_batches, lengths, rule), norm))
    return [
        UpdateShare(shard.rows, minis * plan.epochs, shard.positions)
        for shard, minis in zip(shards, minis_of, strict=True)
    ]


def padding_share(batch: Batch, shares: Sequence[ForwardShare] | Sequence[UpdateShare]) -> float:
    """Share of all ranks' token positions that hold no token of the batch, in [0, 1)."""
    return 1.0 - sum(batch.lengths()) / sum(share.positions for share in shares)
