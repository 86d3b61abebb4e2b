"""Rows that begin alike: computed once, in micro-batches within the limit, each row in one."""

from __future__ import annotations

from itertools import chain, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.batching.balance import SequenceCost
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import (
    padding_share,
    shared_prefix_share,
    split_forward,
    split_update,
)
from rlhf3d.batching.families import Rows, plan_families
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.batching.prefixes import segments_of, sort_rows, token_strings, tree_tokens
from rlhf3d.engine.microbatch import make_microbatch, token_shape
from rlhf3d.parallel.layout import ParallelLayout

BUDGET = 48
RULES = [
    MicroBatching(4, tokens, packed, multiple_of=multiple, share_prefixes=True)
    for tokens, packed, multiple in product((None, BUDGET), (False, True), (1, 4))
]
COST = SequenceCost(0.01)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows of few different tokens, so that many begin alike, and some are equal."""
    token = st.integers(1, 2)
    count = draw(st.integers(1, 20))
    prompts = [draw(st.lists(token, min_size=1, max_size=5)) for _ in range(count)]
    responses = [draw(st.lists(token, max_size=6)) for _ in range(count)]
    return from_sequences(prompts, responses, pad_id=0)


def rows_of(batch: Batch) -> Rows:
    return Rows(batch.lengths(), token_strings(batch["input_ids"], batch.lengths()))


def tokens_of(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of each row."""
    ids = batch["input_ids"].tolist()
    return [tuple(row[:length]) for row, length in zip(ids, batch.lengths(), strict=True)]


@settings(deadline=None)
@given(batch=batches())
def test_a_tree_has_each_beginning_once(batch: Batch) -> None:
    lengths, tokens = batch.lengths(), tokens_of(batch)
    found = sort_rows(range(len(batch)), token_strings(batch["input_ids"], lengths))
    line = segments_of(found, lengths)
    beginnings = set()
    for row in tokens:
        beginnings.update(row[: i + 1] for i in range(len(row)))
    assert line[-1].end == tree_tokens(found, lengths) == len(beginnings)
    for row, expected in enumerate(tokens):
        own = [segment for segment in line if row in segment.rows]
        assert list(chain.from_iterable(range(s.start, s.stop) for s in own)) == [
            *range(len(expected))
        ], "its segments follow each other"
        for segment in own:
            first = tokens[segment.rows[0]]
            assert first[: segment.stop] == expected[: segment.stop]
            later = [s for s in own if s.start >= segment.stop]
            assert all(segment.end <= s.column < s.end <= segment.reach for s in later)
    for number, segment in enumerate(line):
        behind = [s for s in line[number + 1 :] if s.column < segment.reach]
        assert all(set(s.rows) <= set(segment.rows) for s in behind), "all of them follow it"


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(deadline=None, max_examples=50)
@given(
    batch=batches(),
    ranks=st.integers(1, 3),
    multiple=st.sampled_from([1, 2]),
    of_unit=st.integers(1, 3),
)
def test_every_row_once_and_no_micro_batch_over_the_limit(
    rule: MicroBatching, batch: Batch, ranks: int, multiple: int, of_unit: int
) -> None:
    rows, count = rows_of(batch), len(batch)
    units = [range(i, min(i + of_unit, count)) for i in range(0, count, of_unit)]
    plan = plan_families(rows, units, rule, ranks, COST, multiple)
    if plan is None:
        begins = [row[0] for row in tokens_of(batch)]
        # Units are compared by their first rows.
        for compared in ([unit[0] for unit in units], *units):
            assert len({begins[row] for row in compared}) == len(compared)
        return
    assert plan == plan_families(rows, units, rule, ranks, COST, multiple)
    assert len(plan) == ranks and len({len(of_rank) for of_rank in plan}) == 1
    assert len(plan[0]) % multiple == 0
    micro_batches = list(chain.from_iterable(plan))
    assert sorted(chain.from_iterable(micro_batches)) == list(range(count))
    for unit in units:
        (holder,) = (batch for batch in micro_batches if unit[0] in batch)
        start = holder.index(unit[0])
        assert holder[start : start + len(unit)] == list(unit), "together, in order"
    for micro_batch in micro_batches:
        b, s = token_shape(batch, micro_batch, rule)
        assert b * s == rows.positions(micro_batch, rule)
        assert make_microbatch(
            batch, micro_batch, torch.Tensor.contiguous, rule
        ).input_ids.shape == (
            b,
            s,
        )
        if rule.tokens is None:
            assert len(micro_batch) <= rule.rows
        else:
            assert b * s <= rule.tokens


def test_completions_of_a_prompt_stay_together_and_ranks_get_equal_work() -> None:
    """Eight prompts x four completions, dealt in turn as an unlucky loader would."""
    prompts = [[10 + group] * 6 for group in range(8)] * 4
    batch = from_sequences(prompts, [[100 + row] * 5 for row in range(32)], pad_id=0)
    rule = MicroBatching(4, share_prefixes=True)
    for dp in (1, 2, 4):
        shares = split_forward(batch, rule, ParallelLayout(dp=dp), COST)
        assert {len(share.rows) for share in shares} == {32 // dp}
        for share in shares:
            groups = [{share.rows[row] % 8 for row in rows} for rows in share.micro_batches]
            assert [len(group) for group in groups] == [1] * (8 // dp)
        assert sum(share.positions for share in shares) == 8 * (6 + 4 * 5)
        assert shared_prefix_share(batch, shares) == pytest.approx(1 - 26 / 44)
        assert padding_share(shares) == 0.0
    plan = UpdatePlan(1, 32, rule, 4, 1)
    (share,) = split_update(batch, plan, ParallelLayout(), 5, COST)
    assert share.positions == 8 * (6 + 4 * 5)


def test_a_group_is_cut_where_ranks_would_wait() -> None:
    """Three groups over two ranks: each gets one and a half."""
    prompts = [[10 + row // 4] * 3 for row in range(12)]
    batch = from_sequences(prompts, [[100 + row] * 9 for row in range(12)], pad_id=0)
    rule = MicroBatching(4, share_prefixes=True)
    shares = split_forward(batch, rule, ParallelLayout(dp=2), COST)
    assert [len(share.rows) for share in shares] == [6, 6]
    assert [share.positions for share in shares] == [2 * 3 + 6 * 9] * 2


def test_nothing_in_common_is_cut_as_ever() -> None:
    batch = from_sequences([[row] for row in range(5)], [[9] * n for n in (3, 1, 4, 1, 5)], 0)
    for layout in (ParallelLayout(), ParallelLayout(dp=2)):
        rules = [MicroBatching(2, share_prefixes=share) for share in (False, True)]
        plain, shared = (split_forward(batch, rule, layout, COST) for rule in rules)
        assert plain == shared
        assert shared_prefix_share(batch, shared) == 0.0


def test_a_trajectory_that_fits_once_its_rows_share_tokens_is_no_problem() -> None:
    history = [5] * 10
    batch = from_sequences([[5], history], [[5] * 9, [6] * 4], pad_id=0)
    rule = MicroBatching(1, tokens=14, packed=True, share_prefixes=True)
    assert plan_families(rows_of(batch), [[0, 1]], rule, 1, COST) == [[[0, 1]]]
    with pytest.raises(ValueError, match="ppo_max_token_len_per_gpu = 13: a sequence of 14"):
        tight = MicroBatching(1, tokens=13, packed=True, share_prefixes=True)
        plan_families(rows_of(batch), [[0, 1]], tight, 1, COST)
    other = from_sequences([[5, 1], [5, 2]], [[5] * 9, [6] * 9], pad_id=0)
    with pytest.raises(ValueError, match="a trajectory of 2 rows"):
        plan_families(rows_of(other), [[0, 1]], rule, 1, COST)
