"""Shares of a batch: every row once, normalizers global, groups whole, ranks in step, work even."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import for_update, padding_share, split_forward, split_update
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.parallel.layout import ParallelLayout

PROMPT = 2
BUDGET = 24
COST = SequenceCost(0.05)
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(pp=2, dp=2),
    ParallelLayout(pp=2, dp=2, vpp=2),
    ParallelLayout(dp=3),
    ParallelLayout(pp=4, dp=4, vpp=2),
]
RULES = [
    MicroBatching(3, tokens, packed) for tokens, packed in product((None, BUDGET), (False, True))
]


def batch_of(lengths: list[int]) -> Batch:
    return from_sequences([[1] * PROMPT] * len(lengths), [[3] * n for n in lengths], pad_id=0)


def plan(mini: int, rule: MicroBatching, epochs: int = 1) -> UpdatePlan:
    return UpdatePlan(
        mini_batches=0,
        sequences_per_mini_batch=mini,
        micro_batching=rule,
        micro_batches_per_rank=0,
        epochs=epochs,
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, BUDGET - PROMPT), min_size=1, max_size=12))
def test_forward_places_every_row_once(
    layout: ParallelLayout, rule: MicroBatching, lengths: list[int]
) -> None:
    """Whatever the number of rows: the ranks need not divide it."""
    batch = batch_of(lengths)
    shares = split_forward(batch, rule, layout, COST)
    assert sorted(row for share in shares for row in share.rows) == list(range(len(batch)))
    assert len({len(share.micro_batches) for share in shares}) == 1
    for share in shares:
        assert sorted(r for micro in share.micro_batches for r in micro) == list(
            range(len(share.rows))
        )
        if layout.vpp > 1:
            assert len(share.micro_batches) % layout.pp == 0


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_update_runs_through_mini_batches_in_order(
    layout: ParallelLayout, rule: MicroBatching
) -> None:
    """As the loop dealt them, groups whole; the last is incomplete and still trained on."""
    lengths = [5, 1, 3, 2, 9, 7, 4, 8, 6]
    shares = split_update(batch_of(lengths), plan(4, rule, epochs=2), layout, 16, COST)
    assert [len(share.mini_batches) for share in shares] == [6] * layout.dp
    for number, rows in enumerate([{0, 1, 2, 3}, {4, 5, 6, 7}, {8}] * 2):
        seen: list[int] = []
        for share in shares:
            mini = share.mini_batches[number]
            assert mini.norm.tokens == sum(lengths[r] for r in rows)
            assert mini.norm.sequences == len(rows)
            assert len(mini.micro_batches) == len(shares[0].mini_batches[number].micro_batches)
            seen += [share.rows[r] for micro in mini.micro_batches for r in micro]
        assert sorted(seen) == sorted(rows)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mini_batches_count_trajectories_and_cut_none(
    layout: ParallelLayout, rule: MicroBatching, whole: bool
) -> None:
    """Six trajectories, of which the third is empty; the second mini-batch has two."""
    rows_of = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9]]
    batch = batch_of([5, 1, 3, 2, 1, 4, 2, 6, 1, 3])
    batch["response_mask"][3:6] = 0
    owners = [number for number, rows in enumerate(rows_of) for _ in rows]
    batch = batch.with_columns(trajectory_ids=torch.tensor(owners))
    shares = split_update(batch, plan(4, rule), layout, 16, COST, whole)
    counts = [(5 + 1 + 3 + 2, 3), (6 + 1 + 3, 2)]
    for number, trajectories in enumerate((rows_of[:4], rows_of[4:])):
        seen: list[int] = []
        for share in shares:
            mini = share.mini_batches[number]
            assert (mini.norm.tokens, mini.norm.sequences) == counts[number]
            for micro in mini.micro_batches:
                rows = [share.rows[row] for row in micro]
                seen += rows
                for trajectory in trajectories:
                    if whole and set(trajectory) & set(rows):
                        start = rows.index(trajectory[0])
                        assert rows[start : start + len(trajectory)] == trajectory
        assert sorted(seen) == [row for trajectory in trajectories for row in trajectory]


def test_rows_know_the_tokens_of_their_trajectory() -> None:
    """Counted as the update gets them: without the tokens that were rejected."""
    batch = batch_of([5, 1, 3])
    assert for_update(batch) is batch
    batch["response_mask"][0, 1] = 0
    cut = for_update(batch.with_columns(trajectory_ids=torch.tensor([0, 0, 1])))
    assert cut["trajectory_tokens"].tolist() == [5, 5, 3]


def test_shard_rows_are_the_batch_rows() -> None:
    batch = batch_of([2, 6, 1, 4])
    for share in split_update(batch, plan(2, MicroBatching(2)), ParallelLayout(dp=2), 16, COST):
        shard = batch.select(share.rows)
        assert torch.equal(shard["response_lengths"], batch["response_lengths"][share.rows])


def test_a_budget_balances_work_rather_than_rows() -> None:
    """62 tokens cost 62 + 0.05·62² = 254, 22 tokens 46: 254 + 2·46 against 8·46, with equal counts
    + 4·46 to 6·46.
    """
    batch = batch_of([60, *[20] * 10])
    work = {}
    for tokens in (None, 64):
        shares = split_forward(batch, MicroBatching(2, tokens), ParallelLayout(dp=2), COST)
        work[tokens] = sorted(
            sum(COST(batch.lengths()[row]) for row in share.rows) for share in shares
        )
    assert work[64][1] / work[64][0] < 1.1 < 1.5 < work[None][1] / work[None][0]


def test_padding_share_by_hand() -> None:
    batch = batch_of([1, 7, 2, 6])  # with prompts 3 9 4 8
    one, two = ParallelLayout(), ParallelLayout(dp=2)

    def share(rule: MicroBatching, layout: ParallelLayout = one) -> float:
        return padding_share(split_forward(batch, rule, layout, COST))

    assert share(MicroBatching(4)) == pytest.approx(1 - 24 / 36)
    assert share(MicroBatching(2)) == pytest.approx(1 - 24 / 26)
    assert share(MicroBatching(2, multiple_of=4)) == pytest.approx(1 - 24 / 32)
    assert share(MicroBatching(4, packed=True)) == 0.0
    assert share(MicroBatching(4, packed=True, multiple_of=5)) == pytest.approx(1 - 24 / 25)
    assert share(MicroBatching(1), two) == 0.0
    assert padding_share(
        split_update(batch, plan(4, MicroBatching(2), epochs=3), one, 16, COST)
    ) == (pytest.approx(1 - 24 / 26))
    # Three rows over two ranks, one at a time: the second rank's filler is one position.
    three = batch.select([0, 1, 2])
    shares = split_forward(three, MicroBatching(1), two, COST)
    assert padding_share(shares) == pytest.approx(1 - 16 / 17)
