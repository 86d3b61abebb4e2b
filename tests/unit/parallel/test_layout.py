"""Rank coordinates, collectors and layer ranges of ParallelLayout."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.parallel.layout import ParallelLayout, RankCoords, ranges

SIZES = st.integers(1, 4)
LAYOUTS = st.builds(
    ParallelLayout, tp=SIZES, pp=SIZES, dp=SIZES, vpp=st.integers(1, 3), cp=st.integers(1, 2)
)


def test_tensor_ranks_are_neighbors_then_context_then_data_then_pipeline() -> None:
    layout = ParallelLayout(tp=2, pp=2, dp=2, cp=2)
    order = [(c.pp, c.dp, c.cp, c.tp) for c in map(layout.coords, range(16))]
    assert order == list(product((0, 1), repeat=4))
    assert [layout.replica(c) for c in map(layout.coords, range(8))] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [c.first_replica for c in map(layout.coords, range(8))] == [True, True] + [False] * 6


@settings(deadline=None)
@given(LAYOUTS)
def test_rank_inverts_coords_and_every_place_is_taken_once(layout: ParallelLayout) -> None:
    coords = [layout.coords(rank) for rank in range(layout.world_size)]
    assert len(set(coords)) == layout.world_size == layout.tp * layout.pp * layout.dp * layout.cp
    assert [layout.rank(c.tp, c.pp, c.dp, c.cp) for c in coords] == list(range(layout.world_size))


@pytest.mark.parametrize("rank", [-1, 8])
def test_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(AssertionError, match="world of 8"):
        ParallelLayout(tp=2, pp=2, dp=2).coords(rank)


def test_expert_groups_are_runs_of_ranks_within_a_stage() -> None:
    layout = ParallelLayout(tp=2, pp=2, dp=4, ep=4)
    coords = [layout.coords(rank) for rank in range(16)]
    assert [c.ep for c in coords] == [0, 1, 2, 3] * 4
    assert [layout.expert_replica(c) for c in coords] == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    shared = ParallelLayout(tp=2, dp=2, cp=2, ep=4)
    assert [shared.expert_replica(shared.coords(rank)) for rank in range(8)] == [
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        1,
    ]


@settings(deadline=None)
@given(LAYOUTS)
def test_one_collector_a_data_rank_on_the_last_stage(layout: ParallelLayout) -> None:
    places = [layout.coords(rank) for rank in layout.collectors()]
    assert places == [RankCoords(tp=0, pp=layout.pp - 1, dp=d) for d in range(layout.dp)]


@settings(deadline=None)
@given(LAYOUTS, st.integers(1, 3))
def test_layers_are_partitioned_over_stages(layout: ParallelLayout, per_chunk: int) -> None:
    total = layout.pp * layout.vpp * per_chunk
    held = [
        list(layout.layers(total, p, chunk))
        for chunk in range(layout.vpp)
        for p in range(layout.pp)
    ]
    # Chunk by chunk, rank by rank: the order of the forward pass.
    assert [layer for stage in held for layer in stage] == list(range(total))


def test_interleaved_stages() -> None:
    layout = ParallelLayout(pp=2, vpp=2)
    assert [list(layout.layers(8, 0, chunk)) for chunk in (0, 1)] == [[0, 1], [4, 5]]
    assert [list(layout.layers(8, 1, chunk)) for chunk in (0, 1)] == [[2, 3], [6, 7]]


def test_uneven_stages() -> None:
    layout = ParallelLayout(pp=4, first_stage_layers=1, last_stage_layers=3)
    assert layout.stage_layers(8) == [1, 2, 2, 3]
    assert [list(layout.layers(8, p)) for p in range(4)] == [[0], [1, 2], [3, 4], [5, 6, 7]]
    assert ParallelLayout(pp=2, last_stage_layers=2).stage_layers(5) == [3, 2]
    interleaved = ParallelLayout(pp=2, vpp=2, first_stage_layers=2)
    assert [list(interleaved.layers(6, p, c)) for c in (0, 1) for p in (0, 1)] == [
        [0],
        [1, 2],
        [3],
        [4, 5],
    ]


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(pp=3, first_stage_layers=1),
        ParallelLayout(pp=2, first_stage_layers=6),
        ParallelLayout(pp=2, first_stage_layers=2, last_stage_layers=2),
        ParallelLayout(first_stage_layers=3, last_stage_layers=3),
        ParallelLayout(pp=2, vpp=2, first_stage_layers=3),
    ],
    ids=str,
)
def test_uneven_stages_that_do_not_add_up(layout: ParallelLayout) -> None:
    assert layout.stage_layers(6) is None


def test_layers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(AssertionError, match="7 layers do not divide into TP1×PP2×DP1 stages"):
        ParallelLayout(pp=2).layers(7, 0)


def test_text() -> None:
    assert str(ParallelLayout(2, 3, 4)) == "TP2×PP3×DP4"
    assert str(ParallelLayout(2, 3, 4, vpp=2)) == "TP2×PP3×DP4×VPP2"
    assert str(ParallelLayout(2, 3, 4, ep=8)) == "TP2×PP3×DP4×EP8"
    assert (
        str(ParallelLayout(2, 3, 4, first_stage_layers=1, last_stage_layers=2))
        == "TP2×PP3(first 1, last 2)×DP4"
    )


def test_numbers_of_ranks_as_text() -> None:
    assert [ranges(numbers) for numbers in ([3], [0, 1, 2, 3], [0, 1, 4, 5], [])] == [
        "3",
        "0-3",
        "0-1, 4-5",
        "",
    ]
    assert ranges([0, 2, 4, 6]) == "0, 2, 4, …"
    assert ranges([0, 2, 4, 6], most=4) == "0, 2, 4, 6"
