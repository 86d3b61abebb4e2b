"""Shares of a batch: every row once, normalisers global, groups whole."""

from __future__ import annotations

import pytest
import torch

from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import split_forward, split_update
from rlhf3d.config.derived import UpdatePlan
from rlhf3d.parallel.layout import ParallelLayout


def batch_of(lengths: list[int]) -> Batch:
    return from_sequences([[1, 2]] * len(lengths), [[3] * n for n in lengths], pad_id=0)


def plan(mini: int, micro: int, epochs: int = 1) -> UpdatePlan:
    return UpdatePlan(
        mini_batch_size=mini,
        mini_batches=0,
        sequences_per_mini_batch=mini,
        sequences_per_rank=0,
        micro_batch_size=micro,
        micro_batches_per_rank=0,
        epochs=epochs,
        optimizer_steps_per_step=0,
    )


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(pp=2, dp=2), ParallelLayout(pp=2, dp=2, vpp=2)])
def test_forward_places_every_row_once(layout: ParallelLayout) -> None:
    shares = split_forward(batch_of([5, 1, 3, 2, 9, 7, 4, 8]), micro_batch_size=3, layout=layout)
    assert sorted(row for share in shares for row in share.rows) == list(range(8))
    for share in shares:
        assert sorted(r for micro in share.micro_batches for r in micro) == list(range(len(share.rows)))
        if layout.vpp > 1:
            assert len(share.micro_batches) % layout.pp == 0


def test_update_runs_through_mini_batches_in_order() -> None:
    lengths = [5, 1, 3, 2, 9, 7, 4, 8]
    shares = split_update(batch_of(lengths), plan(mini=4, micro=1, epochs=2), ParallelLayout(dp=2), 16)
    assert [len(share.mini_batches) for share in shares] == [4, 4]
    for number, rows in enumerate([{0, 1, 2, 3}, {4, 5, 6, 7}] * 2):
        seen: set[int] = set()
        for share in shares:
            mini = share.mini_batches[number]
            assert mini.norm.tokens == sum(lengths[r] for r in rows)
            assert mini.norm.sequences == 4
            seen |= {share.rows[r] for micro in mini.micro_batches for r in micro}
        assert seen == rows


def test_shard_rows_are_the_batch_rows() -> None:
    batch = batch_of([2, 6, 1, 4])
    for share in split_update(batch, plan(mini=2, micro=2), ParallelLayout(dp=2), 16):
        shard = batch.select(share.rows)
        assert torch.equal(shard["response_lengths"], batch["response_lengths"][share.rows])
