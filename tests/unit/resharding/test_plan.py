"""The reshard plan, carried out by plain copies, gives every engine rank exactly its weights, each
element once.

Also proven: an op's sender holds what it sends; what the own device holds comes from nowhere else,
and what the own node holds from no other node; replicas share the sending; the bytes received reach
HybridFlow's lower bound and, on small worlds, the best of all mappings of engine ranks to devices.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.weights import (
    LLAMA,
    QWEN2,
    QWEN3_MOE,
    Pair,
    Params,
    carry_out,
    cut,
    numbered_tensors,
    pairs,
    rank_params,
)

from rlhf3d.models.boxes import Piece, box_slices, intersect, volume
from rlhf3d.models.engine_weights import check_engine_layout
from rlhf3d.models.spec import ModelSpec, check_layout
from rlhf3d.models.weights import LocalParam, hf_tensors
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.resharding.plan import Destination, ReshardPlan, TrainingShards, TransferOp, build_plan
from rlhf3d.resharding.sites import Sites
from rlhf3d.resharding.tables import plan_export, plan_sync

BENCH = Path(__file__).parents[3] / "tools" / "bench" / "reshard_plan.py"
Ints = tuple[int, ...]
Held = dict[str, torch.Tensor]
"""Tensor -> which of its elements some ranks hold."""


class Case(NamedTuple):
    """What a plan is made from; small to print."""

    pair: Pair
    sites: Sites
    engines: int
    colocated: bool

    def plan(self) -> ReshardPlan:
        spec, layout, tp, expert_parallel = self.pair
        return plan_sync(
            spec,
            layout,
            self.sites,
            self.engines,
            tp,
            colocated=self.colocated,
            expert_parallel=expert_parallel,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any legal pair of layouts, engines beside the training ranks (hosts or GPUs) or apart."""
    pair = draw(pairs())
    world = pair.layout.world_size
    check_layout(pair.spec, pair.layout)
    check_engine_layout(pair.spec, pair.engine_tp, pair.expert_parallel)
    place = draw(st.sampled_from(["hosts", "gpus", "apart"]))
    if place == "gpus" and pair.engine_tp <= world:
        per_node = draw(st.integers(1, world))
        nodes, rest = divmod(world, per_node)
        room = nodes * (per_node // pair.engine_tp) + rest // pair.engine_tp
        return Case(pair, Sites.gpus(world, per_node), draw(st.integers(1, max(1, room))), True)
    hosts = list(range(draw(st.integers(1, min(world, 3)))))
    others = draw(
        st.lists(st.sampled_from(hosts), min_size=world - len(hosts), max_size=world - len(hosts))
    )
    return Case(
        pair,
        Sites.hosts(draw(st.permutations(hosts + others))),
        draw(st.integers(1, 3)),
        place != "apart",
    )


def training_weights(
    spec: ModelSpec, layout: ParallelLayout
) -> tuple[dict[str, torch.Tensor], dict[int, Params]]:
    tensors = numbered_tensors(spec)
    return tensors, {
        rank: rank_params(tensors, spec, layout, rank) for rank in range(layout.world_size)
    }


@settings(deadline=None, max_examples=60, derandomize=True)
@given(cases())
def test_carrying_out_the_ops_gives_every_engine_rank_its_weights(case: Case) -> None:
    pair, plan = case.pair, case.plan()
    tensors, training = training_weights(pair.spec, pair.layout)
    fed = set()
    for place in plan.destinations:
        made, writes, ops = carry_out(plan, place.number, training)
        table = plan.engine_tables[place.index]
        for name, weight in cut(tensors, table).items():
            assert torch.equal(made[name], weight), name
            # Numbers start at 1, so zeros are padding.
            assert torch.equal(writes[name], (weight != 0).int()), name
        for op in ops:
            block = training[op.src_rank][op.src_chunk, op.src_param][box_slices(op.src_box)]
            assert torch.equal(tensors[op.tensor][box_slices(op.box)], block), op
            assert op.dst == place.number
        assert plan.senders_to(place.number) == sorted({op.src_rank for op in ops})
        by_sender = [
            list(plan.ops_from(sender, place.number)) for sender in plan.senders_to(place.number)
        ]
        assert sorted(map(str, itertools.chain(*by_sender))) == sorted(map(str, ops))
        fed |= {(engine, place.index) for engine in place.engines}
    engines = {engine for engine, _ in fed}
    assert engines == set(range(len(engines)))
    assert fed == set(itertools.product(engines, range(pair.engine_tp)))


def held_by(ranks: list[int], shards: TrainingShards, tensors: dict[str, torch.Tensor]) -> Held:
    """Which elements the training ranks hold together, from their tables alone."""
    held = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in tensors.items()}
    for table, holders in zip(shards.tables, shards.ranks, strict=True):
        if set(holders) & set(ranks):
            for piece in (piece for chunk in table for param in chunk for piece in param.pieces):
                held[piece.hf_name][box_slices(piece.hf_box)] = True
    return held


@settings(deadline=None, max_examples=40, derandomize=True)
@given(cases())
def test_nothing_comes_from_farther_than_it_must(case: Case) -> None:
    pair, plan = case.pair, case.plan()
    tensors, sites = numbered_tensors(pair.spec), plan.sites
    traffic = plan.traffic
    sent = [0] * pair.layout.world_size
    for place in plan.destinations:
        ranks = range(pair.layout.world_size)
        on_device = [rank for rank in ranks if sites.device_of_rank[rank] == place.device]
        node = None if place.device is None else sites.node_of_device[place.device]
        here = held_by(on_device, plan.shards, tensors)
        near = held_by(
            [rank for rank in ranks if sites.node_of_rank(rank) == node], plan.shards, tensors
        )
        needed = local = 0
        for op in plan.ops_to(place.number):
            needed += volume(op.box)
            if op.src_rank in on_device:
                local += volume(op.box)
                continue
            sent[op.src_rank] += volume(op.box)
            assert not here[op.tensor][box_slices(op.box)].any(), (
                f"{op} although device {place.device} has it"
            )
            if sites.node_of_rank(op.src_rank) != node:
                assert not near[op.tensor][box_slices(op.box)].any(), (
                    f"{op} although node {node} has it"
                )
        table = plan.engine_tables[place.index]
        held = sum(
            int(here[p.hf_name][box_slices(p.hf_box)].sum())
            for param in table
            for p in param.pieces
        )
        assert (needed, local) == (
            sum(volume(p.hf_box) for param in table for p in param.pieces),
            held,
        )
        i = place.number
        assert (traffic.needed[i], traffic.local[i], traffic.received[i]) == (
            needed,
            local,
            needed - local,
        )
    assert traffic.sent == tuple(sent)
    assert traffic.ops == tuple(len(list(plan.ops_to(place.number))) for place in plan.destinations)


def holding_shards(plan: ReshardPlan, op: TransferOp) -> tuple[int, ...]:
    """The shards that hold an op's block, from the tables alone."""
    return tuple(
        number
        for number, chunks in enumerate(plan.shards.tables)
        if any(
            piece.hf_name == op.tensor and intersect(piece.hf_box, op.box) == op.box
            for chunk in chunks
            for param in chunk
            for piece in param.pieces
        )
    )


def nearest(ranks: list[int], place: Destination, sites: Sites) -> tuple[int, ...]:
    """Those of `ranks` on a destination's device, else on its node, else all."""
    node = None if place.device is None else sites.node_of_device[place.device]
    on_device = [rank for rank in ranks if sites.device_of_rank[rank] == place.device]
    return tuple(on_device or [rank for rank in ranks if sites.node_of_rank(rank) == node] or ranks)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(cases())
def test_replicas_send_equally_much(case: Case) -> None:
    """n replicas that d engine ranks can take E elements from send d E / n each, give or take a
    quarter and a row.
    """
    plan = case.plan()
    sent: dict[tuple[Ints, int, Ints], list[TransferOp]] = defaultdict(list)
    demand: dict[tuple[Ints, int, Ints], set[int]] = defaultdict(set)
    for place in plan.destinations:
        for op in plan.ops_to(place.number):
            shards = holding_shards(plan, op)
            pool = nearest(
                sorted(rank for shard in shards for rank in plan.shards.ranks[shard]),
                place,
                plan.sites,
            )
            assert op.src_rank in pool, f"{op} from outside {pool}"
            sent[shards, place.index, pool].append(op)
            demand[shards, place.index, pool].add(place.number)
    for key, ops in sent.items():
        pool, d = key[2], len(demand[key])
        loads = dict.fromkeys(pool, 0)
        for op in ops:
            loads[op.src_rank] += volume(op.box)
        each = sum(loads.values()) // d
        parts = len(pool) // gcd(d, len(pool))
        row = max(volume(op.box) // (op.box[0][1] - op.box[0][0]) for op in ops)
        uneven = 0 if parts == 1 else max(1, each // (4 * parts)) + row
        assert max(loads.values()) - min(loads.values()) <= d * parts // len(pool) * uneven, (
            key,
            loads,
        )


@pytest.mark.parametrize("engines", [1, 2, 3, 4, 8])
def test_data_parallel_ranks_send_within_a_quarter_of_their_mean(engines: int) -> None:
    layout = ParallelLayout(tp=2, pp=1, dp=8)
    sites = Sites.hosts([0] * layout.world_size)
    for tp in (1, 2, 4):
        sent = plan_sync(QWEN2, layout, sites, engines, tp, colocated=False).traffic.sent
        assert max(sent) <= 1.25 * sum(sent) / len(sent), sent


def even_shards(layout: ParallelLayout, layers: int, rows: int, columns: int) -> TrainingShards:
    """Every tensor cut evenly by rows over `layout.tp`, every stage with as many.

    Nothing on two shards.
    """
    share = rows // layout.tp
    tables, ranks = [], []
    for pp, tp in itertools.product(range(layout.pp), range(layout.tp)):
        stage = layout.layers(layers, pp)
        box = ((tp * share, (tp + 1) * share), (0, columns))
        local = ((0, share), (0, columns))
        params = [
            LocalParam(f"p{n}", (share, columns), (Piece(f"w{n}", box, local),), primary=True)
            for n in stage
        ]
        tables.append((tuple(params),))
        ranks.append(tuple(layout.rank(tp, pp, dp) for dp in range(layout.dp)))
    return TrainingShards(tuple(tables), tuple(ranks))


def even_engine(g: int, layers: int, rows: int, columns: int) -> list[list[LocalParam]]:
    """Every tensor cut evenly by rows over `g` ranks."""
    share = rows // g
    return [
        [
            LocalParam(
                f"q{n}",
                (share, columns),
                (
                    Piece(
                        f"w{n}",
                        ((i * share, (i + 1) * share), (0, columns)),
                        ((0, share), (0, columns)),
                    ),
                ),
                primary=True,
            )
            for n in range(layers)
        ]
        for i in range(g)
    ]


EVEN = [
    (tp, pp, dp, g)
    for tp in (1, 2, 4, 8)
    for pp in (1, 2, 3)
    for dp in (1, 2)
    for g in (1, 2, 4, 8)
    if tp % g == 0
]


@pytest.mark.parametrize(("tp", "pp", "dp", "g"), EVEN)
def test_received_bytes_are_the_lower_bound(tp: int, pp: int, dp: int, g: int) -> None:
    """(n - g) / (n g) of the model for every colocated rank, n = tp pp.

    1 / g of it for every rank apart.
    """
    layers, rows, columns = 6, 64, 3
    layout = ParallelLayout(tp, pp, dp)
    shards, engine = (
        even_shards(layout, layers, rows, columns),
        even_engine(g, layers, rows, columns),
    )
    whole, n = layers * rows * columns, tp * pp
    sites = Sites.gpus(layout.world_size, per_node=tp)
    traffic = build_plan(shards, engine, sites, layout.world_size // g, colocated=True).traffic
    assert set(traffic.received) == {Fraction(n - g, n * g) * whole}
    assert sum(traffic.received) == sum(traffic.sent)
    apart = build_plan(shards, engine, sites, engines=2, colocated=False).traffic
    assert set(apart.received) == {Fraction(whole, g)}


def test_hybridflow_table_2() -> None:
    """Training TP8, generation TP2: three eighths of the model per rank, where a full gather takes
    seven.
    """
    layout = ParallelLayout(tp=8)
    shards, engine = even_shards(layout, 4, 64, 4), even_engine(2, 4, 64, 4)
    traffic = build_plan(shards, engine, Sites.gpus(8, 8), engines=4, colocated=True).traffic
    assert set(traffic.received) == {0.375 * 4 * 64 * 4}


TP2_EP4 = ParallelLayout(tp=2, dp=2, ep=4)
SMALL_WORLDS = [
    # model, training layout, GPUs a node, engines, their TP, experts whole
    (LLAMA, ParallelLayout(tp=4), 4, 2, 2, False),
    (LLAMA, ParallelLayout(tp=4), 4, 1, 2, False),
    (LLAMA, ParallelLayout(tp=2, pp=2), 4, 2, 2, False),
    (LLAMA, ParallelLayout(tp=2, pp=2), 2, 2, 2, False),
    (LLAMA, ParallelLayout(tp=2, pp=2), 2, 1, 4, False),
    (LLAMA, ParallelLayout(tp=1, pp=4), 4, 4, 1, False),
    (LLAMA, ParallelLayout(tp=2, dp=3), 6, 1, 4, False),
    (QWEN2, ParallelLayout(tp=2, pp=2), 4, 1, 4, False),
    (QWEN2, ParallelLayout(tp=1, pp=2, dp=3), 3, 2, 2, False),
    (QWEN3_MOE, TP2_EP4, 4, 2, 2, False),
    (QWEN3_MOE, TP2_EP4, 4, 2, 2, True),
    (QWEN3_MOE, TP2_EP4, 2, 1, 4, True),
    (QWEN3_MOE, ParallelLayout(dp=4, ep=2), 4, 1, 4, False),
    (QWEN3_MOE, ParallelLayout(dp=4, ep=4), 4, 1, 4, True),
]


@pytest.mark.parametrize(
    ("spec", "layout", "per_node", "engines", "tp", "expert_parallel"), SMALL_WORLDS
)
def test_no_other_mapping_keeps_more(
    spec: ModelSpec,
    layout: ParallelLayout,
    per_node: int,
    engines: int,
    tp: int,
    expert_parallel: bool,
) -> None:
    """Against every way to give the ranks an engine index or none, engines being whole on a node
    where they fit.
    """
    world = layout.world_size
    plan = plan_sync(
        spec, layout, Sites.gpus(world, per_node), engines, tp, expert_parallel=expert_parallel
    )
    tensors = numbered_tensors(spec)
    keeps = [
        [
            sum(
                int(held[p.hf_name][box_slices(p.hf_box)].sum())
                for param in table
                for p in param.pieces
            )
            for table in plan.engine_tables
        ]
        for held in (held_by([rank], plan.shards, tensors) for rank in range(world))
    ]
    best = 0
    for mapping in itertools.product([None, *range(tp)], repeat=world):
        size = max(per_node, tp)
        on_node = [mapping[start : start + size] for start in range(0, world, size)]
        whole = all(len({some.count(index) for index in range(tp)}) == 1 for some in on_node)
        if whole and sum(some.count(0) for some in on_node) == engines:
            best = max(
                best,
                sum(keeps[rank][index] for rank, index in enumerate(mapping) if index is not None),
            )
    assert sum(plan.traffic.local) == best


@pytest.mark.parametrize("spec", [LLAMA, QWEN2, QWEN3_MOE])
def test_an_export_takes_every_tensor_whole(spec: ModelSpec) -> None:
    layout = ParallelLayout(tp=2, pp=2, dp=2, ep=2 if spec.num_experts else 1)
    plan = plan_export(spec, layout, Sites.hosts([0, 0, 0, 0, 1, 1, 1, 1]), beside=5)
    tensors, training = training_weights(spec, layout)
    made, _, _ = carry_out(plan, 0, training)
    # The order in which a folder's files are written.
    assert list(made) == list(hf_tensors(spec, "lm"))
    assert len(plan.destinations) == 1 and plan.destinations[0].device == 1
    assert set(made) == set(tensors)
    assert all(torch.equal(made[name], tensor) for name, tensor in tensors.items())


def test_engines_on_one_host_share_a_destination() -> None:
    layout = ParallelLayout(tp=2, pp=2)
    plan = plan_sync(LLAMA, layout, Sites.hosts([0, 0, 1, 1]), engines=3, tensor_parallel_size=2)
    assert [(d.device, d.index, d.engines) for d in plan.destinations] == [
        (0, 0, (0, 1)),
        (0, 1, (0, 1)),
        (1, 0, (2,)),
        (1, 1, (2,)),
    ]
    assert sum(plan.traffic.received) == sum(plan.traffic.sent)


def test_a_training_side_that_lacks_or_doubles_a_block_is_refused() -> None:
    layout, engine = ParallelLayout(tp=2), even_engine(1, 2, 8, 2)
    shards = even_shards(layout, 2, 8, 2)
    lacking = TrainingShards(shards.tables[:1], shards.ranks[:1])
    with pytest.raises(
        AssertionError, match=r"hold 8 of the 16 elements of w0\[0:8, 0:2\], which q0 needs"
    ):
        build_plan(lacking, engine, Sites.gpus(2, 2), 1, colocated=True)
    wider = even_shards(ParallelLayout(), 2, 8, 2)
    doubled = TrainingShards(shards.tables + wider.tables, (*shards.ranks, (2,)))
    with pytest.raises(AssertionError, match="hold 32 of the 16 elements"):
        build_plan(doubled, engine, Sites.gpus(3, 3), 1, colocated=True)


def test_ops_by_hand() -> None:
    """One bias of four on two training ranks, two engine ranks that want it the other way round."""
    shards = even_shards(ParallelLayout(tp=2), 1, 4, 1)
    engine = even_engine(2, 1, 4, 1)[::-1]
    plan = build_plan(shards, engine, Sites.hosts([0, 0]), 1, colocated=True)
    assert [str(op) for op in plan.ops_to(0)] == [
        "w0[2:4, 0:1]: rank 1 p0[0:2, 0:1] -> destination 0 q0[0:2, 0:1]"
    ]
    assert [op.src_rank for op in plan.ops_to(1)] == [0]
    assert list(plan.ops_from(0, 0)) == []


def test_a_rank_left_without_a_row_is_no_sender() -> None:
    """Two replicas share one row: it cannot be cut, so one of them has nothing to send."""
    shards, engine = even_shards(ParallelLayout(dp=2), 1, 1, 4), even_engine(1, 1, 1, 4)
    plan = build_plan(shards, engine, Sites.hosts([0, 0]), 1, colocated=False)
    assert (
        plan.senders_to(0) == [op.src_rank for op in plan.ops_to(0)]
        and len(plan.senders_to(0)) == 1
    )


def test_planning_a_thousand_ranks_stays_within_its_limits() -> None:
    """Llama 3 405B from TP8 PP16 DP8 to 128 engines, in a process of its own: 10 s, 2 GiB, received
    as the bound.
    """
    run = subprocess.run(
        [sys.executable, str(BENCH), "--only", "llama-3-405b", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = json.loads(run.stdout)
    assert row["ranks"] == 1024 and row["engines"] == 128
    assert row["bound_bytes"] <= row["received_max_bytes"] <= 1.01 * row["bound_bytes"]
