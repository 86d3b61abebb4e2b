"""Buckets hold every real row once, within the budget, whole parameters whole.

Copies fill them without a gap.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.weights import LLAMA, QWEN2, QWEN3_MOE, Pair, cut, numbered_tensors, pairs, rank_params

from rlhf3d.models.boxes import Piece, box_slices, full_box, volume
from rlhf3d.models.engine_weights import engine_params
from rlhf3d.models.weights import LocalParam
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.buckets import ALIGNMENT_BYTES, Bucket, copies_to, plan_buckets, real_rows
from rlhf3d.resharding.fingerprints import box_shape
from rlhf3d.resharding.sites import Sites
from rlhf3d.resharding.tables import plan_sync


def param(name: str, *shape: int) -> LocalParam:
    return LocalParam(name, shape, (Piece(name, full_box(shape), full_box(shape)),), primary=True)


def largest_row(table: list[LocalParam], itemsize: int) -> int:
    return max(math.prod(p.shape[1:]) * itemsize for p in table)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(pairs(), st.sampled_from([2, 4]), st.integers(0, 3000), st.integers(0, 5))
def test_buckets_hold_every_real_row_once(pair: Pair, itemsize: int, extra: int, rank: int) -> None:
    table = engine_params(pair.spec, pair.engine_tp, rank % pair.engine_tp, pair.expert_parallel)
    budget = largest_row(table, itemsize) + extra
    buckets = plan_buckets(table, itemsize, budget)
    rows: list[tuple[int, int]] = []
    for bucket in buckets:
        assert 0 < bucket.num_bytes <= budget
        end = 0
        for segment in bucket.segments:
            shape = table[segment.param].shape
            first, last = segment.rows
            assert segment.shape == (last - first, *shape[1:])
            assert segment.offset % ALIGNMENT_BYTES == 0 and segment.offset >= end, (
                "segments lie apart"
            )
            end = segment.offset + math.prod(segment.shape) * itemsize
            assert segment.complete == (segment.rows == (0, shape[0]))
            rows += [(segment.param, row) for row in range(first, last)]
        assert end <= bucket.num_bytes
    assert rows == [(n, row) for n, p in enumerate(table) for row in range(real_rows(p))], (
        "in the engine's order"
    )
    for number, p in enumerate(table):
        if real_rows(p) * math.prod(p.shape[1:]) * itemsize <= budget:
            parts = [s for bucket in buckets for s in bucket.segments if s.param == number]
            assert len(parts) == (real_rows(p) > 0), (
                f"{p.name} fits a bucket and is in {len(parts)}"
            )


def test_a_large_budget_makes_one_bucket_and_a_small_one_fills_buckets() -> None:
    table = [param("a", 4, 8), param("b", 100, 8), param("c", 8)]
    (one,) = plan_buckets(table, 4, 1 << 20)
    assert [s.param for s in one.segments] == [0, 1, 2] and all(s.complete for s in one.segments)
    cut_up = plan_buckets(table, 4, 256)
    assert [[(s.param, s.rows) for s in bucket.segments] for bucket in cut_up][:2] == [
        [(0, (0, 4)), (1, (0, 4))],
        [(1, (4, 12))],
    ]
    assert [(s.param, s.rows) for s in cut_up[-1].segments][-1] == (2, (0, 8))


def test_a_bucket_is_no_larger_than_a_budget_that_is_not_aligned() -> None:
    buckets = plan_buckets([param("a", 25, 1), param("b", 25, 1)], 4, 100)
    assert [bucket.num_bytes for bucket in buckets] == [100, 100]


def test_a_budget_below_one_row_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError,
        match=r"sync_bucket_mib: a bucket of 31 bytes cannot hold one row of b \(32 bytes\)",
    ):
        plan_buckets([param("a", 4, 4), param("b", 2, 8)], 4, 31)


def test_padding_is_left_out() -> None:
    """Rank 1 of 2 has 64 of 128 rows, of which 6 are real; rank 3 of 4 has none."""
    spec = LLAMA
    assert [real_rows(engine_params(spec, 2, rank)[0]) for rank in range(2)] == [64, 6]
    last = engine_params(spec, 4, 3)
    assert real_rows(last[0]) == 0
    assert 0 not in {s.param for bucket in plan_buckets(last, 2, 1 << 20) for s in bucket.segments}


@pytest.mark.parametrize(
    ("spec", "layout", "tp", "expert_parallel", "budget"),
    [
        (LLAMA, ParallelLayout(tp=4, pp=2, vpp=2), 2, False, 257),
        (LLAMA, ParallelLayout(tp=2, pp=2, dp=3), 8, False, 500),
        (QWEN2, ParallelLayout(tp=1, pp=2), 4, False, 100),
        (QWEN3_MOE, ParallelLayout(tp=2, dp=2, ep=4), 2, False, 4000),
        (QWEN3_MOE, ParallelLayout(tp=2, pp=2, ep=2), 2, True, 1 << 20),
    ],
)
def test_copies_fill_the_buckets_with_the_weights(
    spec: object, layout: ParallelLayout, tp: int, expert_parallel: bool, budget: int
) -> None:
    assert isinstance(spec, type(LLAMA))
    plan = plan_sync(
        spec, layout, Sites.hosts([0] * layout.world_size), 1, tp, expert_parallel=expert_parallel
    )
    tensors = numbered_tensors(spec)
    training = [rank_params(tensors, spec, layout, rank) for rank in range(layout.world_size)]
    for place in plan.destinations:
        table = plan.engine_tables[place.index]
        buckets = plan_buckets(table, 4, max(budget, largest_row(list(table), 4)))
        filled, writes = empty(buckets), empty(buckets)
        for sender in plan.senders_to(place.number):
            by_bucket = copies_to(plan, place.number, sender, buckets)
            copies = [copy for some in by_bucket for copy in some]
            assert sorted(copy.row for copy in copies) == list(range(len(copies))), (
                "rows number a sender's copies"
            )
            assert all(copy.sender == sender for copy in copies)
            for number, some in enumerate(by_bucket):
                for copy in some:
                    assert volume(copy.src_box) == volume(copy.box) == volume(copy.hf_box)
                    block = training[sender][copy.src_chunk, copy.src_param][
                        box_slices(copy.src_box)
                    ]
                    assert torch.equal(tensors[copy.tensor][box_slices(copy.hf_box)], block)
                    start, stop = copy.offset // 4, copy.offset // 4 + math.prod(copy.shape)
                    for memory, value in ((filled, block), (writes, torch.ones_like(block))):
                        segment = memory[number][start:stop].view(copy.shape)
                        segment[box_slices(copy.box)] += value.view(box_shape(copy.box))
        wanted = cut(tensors, table)
        for memory, counts, bucket in zip(filled, writes, buckets, strict=True):
            for segment in bucket.segments:
                start, stop = segment.offset // 4, segment.offset // 4 + math.prod(segment.shape)
                rows = wanted[table[segment.param].name][slice(*segment.rows)]
                assert torch.equal(memory[start:stop].view(segment.shape), rows)
                assert (counts[start:stop] == 1).all()


def empty(buckets: tuple[Bucket, ...]) -> list[torch.Tensor]:
    """float32 memory for every bucket."""
    return [torch.zeros(-(-bucket.num_bytes // 4)) for bucket in buckets]
