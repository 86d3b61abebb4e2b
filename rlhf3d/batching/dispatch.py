"""Who computes which rows: a batch cut over data-parallel ranks, mini-batches and micro-batches.

Invariant: each row goes to exactly one data-parallel rank, once per pass; mini-batches are the
trajectories in the order of the batch, none is cut; every rank of a pass has the same number of
micro-batches; and the cut never enters the mathematics.
Pure: rows and numbers, no processes. A plan is complete before its pass starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

from rlhf3d.algorithms.aggregation import LossNorm, loss_norm
from rlhf3d.algorithms.trajectories import join_rows, row_places, trajectory_tokens
from rlhf3d.batching.balance import SequenceCost, split_rows
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.families import Rows, plan_families
from rlhf3d.batching.micro import MicroBatching, UpdatePlan, plan_micro_batches
from rlhf3d.batching.prefixes import token_strings
from rlhf3d.batching.units import plan_unit_micro_batches
from rlhf3d.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step on one data-parallel rank."""

    micro_batches: list[list[int]]
    """Rows of the rank's shard, by micro-batch; an empty one is a filler."""
    norm: LossNorm
    """Counts of the mini-batch over all data-parallel ranks."""


@dataclass
class Share:
    """What one data-parallel rank computes of a batch."""

    rows: list[int] = field(default_factory=list)
    """Rows of the batch, in the order of the rank's shard."""
    positions: int = 0
    """Token positions of a pass, of an update of one epoch; padding and fillers included."""
    tokens: int = 0
    """Of these, positions of tokens: those that rows of a micro-batch share count once."""

    def add(
        self, micro_batches: list[list[int]], all_rows: Rows, rule: MicroBatching
    ) -> list[list[int]]:
        """Give it the rows of these micro-batches; return the same with the shard's row numbers."""
        in_shard = []
        for rows in micro_batches:
            self.positions += all_rows.positions(rows, rule)
            self.tokens += all_rows.tokens(rows)
            start = len(self.rows)
            in_shard.append(list(range(start, start + len(rows))))
            self.rows += rows
        return in_shard


@dataclass
class ForwardShare(Share):
    """Of a forward pass."""

    micro_batches: list[list[int]] = field(default_factory=list)
    """Rows of the shard, by micro-batch; an empty one is a filler."""


@dataclass
class UpdateShare(Share):
    """Of an update."""

    mini_batches: list[MiniBatch] = field(default_factory=list)
    """Optimizer steps in order, epochs unrolled."""


def _rows(batch: Batch, rule: MicroBatching) -> Rows:
    lengths = batch.lengths()
    if not rule.share_prefixes:
        return Rows(lengths)
    return Rows(lengths, token_strings(batch["input_ids"], lengths))


def _cut(
    rows: Rows,
    units: Sequence[Sequence[int]],
    rule: MicroBatching,
    layout: ParallelLayout,
    cost: SequenceCost,
) -> list[list[list[int]]]:
    """Micro-batches of the rows in `units`, by data-parallel rank.

    The rows of a unit are in one micro-batch, in their order.
    """
    # The interleaved schedule needs a multiple of the pipeline stages.
    multiple = layout.pp if layout.vpp > 1 else 1
    if rule.share_prefixes:
        planned = plan_families(rows, units, rule, layout.dp, cost, multiple)
        if planned is not None:
            return planned
    lengths, costs = rows.lengths, []
    for unit in units:
        costs.append(sum(cost(lengths[row]) for row in unit))
    units_of: list[list[Sequence[int]]] = []
    # With a budget of tokens, ranks may have unequal numbers of rows.
    for part in split_rows(costs, layout.dp, equal_counts=rule.tokens is None):
        units_of.append([units[i] for i in part])
    if any(len(unit) > 1 for unit in units):
        return plan_unit_micro_batches(lengths, units_of, rule, multiple)
    rows_of = [list(chain.from_iterable(part)) for part in units_of]
    return plan_micro_batches(lengths, rows_of, rule, multiple)


def _single_rows(rows: Iterable[int]) -> list[list[int]]:
    """Units for what is computed row by row."""
    return [[row] for row in rows]


def _trajectories(batch: Batch) -> list[list[int]]:
    """The rows of each trajectory."""
    rows = range(len(batch))
    if "trajectory_ids" not in batch:
        return _single_rows(rows)
    ids = batch["trajectory_ids"].tolist()
    return [list(part) for _, part in groupby(rows, key=ids.__getitem__)]


def for_update(batch: Batch) -> Batch:
    """The batch with what the losses read of trajectories of several rows.

    A column `trajectory_tokens` [N]: the response tokens of each row's complete trajectory, since
    its other rows may be computed elsewhere. Without such trajectories, the batch as it is.
    """
    places = row_places(batch.columns)
    if places is None:
        return batch
    tokens = trajectory_tokens(batch["response_mask"], places)
    return batch.with_columns(trajectory_tokens=tokens)


def split_forward(
    batch: Batch, rule: MicroBatching, layout: ParallelLayout, cost: SequenceCost
) -> list[ForwardShare]:
    """Return the shares of a forward pass, by data-parallel rank.

    Raises ValueError for a sequence over the token budget.
    """
    rows, shares = _rows(batch, rule), []
    for micro_batches in _cut(rows, _single_rows(range(len(batch))), rule, layout, cost):
        share = ForwardShare()
        share.micro_batches = share.add(micro_batches, rows, rule)
        shares.append(share)
    return shares


def split_update(
    batch: Batch,
    plan: UpdatePlan,
    layout: ParallelLayout,
    max_response_tokens: int,
    cost: SequenceCost,
    whole_trajectories: bool = False,
) -> list[UpdateShare]:
    """Return the shares of an update, by data-parallel rank.

    Mini-batches are runs of consecutive trajectories, so groups stay together and lengths stay
    mixed; the last may be smaller. The rows of a trajectory may be computed anywhere, except with
    `whole_trajectories`: then in one micro-batch, in order. Raises ValueError for a sequence over
    the token budget, and for a trajectory over it that must not be cut.
    """
    rule = plan.micro_batching
    rows = _rows(batch, rule)
    trajectories, size = _trajectories(batch), plan.sequences_per_mini_batch
    # [T, R']: a row is a complete trajectory.
    mask = join_rows(batch["response_mask"], row_places(batch.columns))
    shares = [UpdateShare() for _ in range(layout.dp)]
    for start in range(0, len(trajectories), size):
        # Counted before the cut: the loss does not depend on which rank computes which rows.
        norm = loss_norm(mask[start : start + size], max_response_tokens)
        units = trajectories[start : start + size]
        if not whole_trajectories:
            units = _single_rows(chain.from_iterable(units))
        cut = _cut(rows, units, rule, layout, cost)
        for share, micro_batches in zip(shares, cut, strict=True):
            share.mini_batches.append(MiniBatch(share.add(micro_batches, rows, rule), norm))
    for share in shares:
        share.mini_batches *= plan.epochs
    return shares


def padding_share(shares: Sequence[Share]) -> float:
    """Return the share of all token positions that hold no token of the batch, in [0, 1)."""
    tokens = sum(share.tokens for share in shares)
    return 1.0 - tokens / sum(share.positions for share in shares)


def shared_prefix_share(batch: Batch, shares: Sequence[Share]) -> float:
    """Return the share of the batch's tokens that took no position, as others have them."""
    return 1.0 - sum(share.tokens for share in shares) / sum(batch.lengths())
