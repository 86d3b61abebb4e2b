"""The reshard plan: which block of which parameter goes from which training rank to which engine rank.

Invariant: the ops to a destination tile every block its engine rank needs exactly once, each sent by one rank that
holds it: on the destination's own device if there is one, else on its node, else any, in equal shares. Pure: no torch,
no process.

A destination is one tensor-parallel index of vLLM on one device; engines on a device that need the same bytes share
it. Blocks held by the same set of ranks and needed by the same index form a bundle: who sends is settled a bundle at a
time, so that a plan for a thousand ranks stays small and its ops are made when they are asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

from rlhf3d.models.boxes import Box, intersect, locate, show, split_rows, volume
from rlhf3d.models.weights import LocalParam
from rlhf3d.resharding.sites import Sites, assign_engines


class Source(NamedTuple):
    """A block in a training rank's memory."""

    shard: int
    """Which distinct shard of the model; `TrainingShards.ranks` says who holds it."""
    chunk: int
    """Model chunk (virtual pipeline stage) on the rank."""
    param: str
    box: Box


class Cell(NamedTuple):
    """A block that is whole in some training shards and needed whole by one engine index."""

    tensor: str
    """Hugging Face tensor and the block's place in it."""
    box: Box
    param: int
    """Number of the engine's parameter and the block's place in it."""
    param_box: Box
    sources: tuple[Source, ...]
    """The same block in each shard that holds it."""

    @property
    def elements(self) -> int:
        """Size of the block."""
        return volume(self.box)


@dataclass(frozen=True)
class TransferOp:
    """One block from one training rank to one destination."""

    src_rank: int
    src_chunk: int
    src_param: str
    src_box: Box
    dst: int
    dst_param: str
    dst_box: Box
    tensor: str
    box: Box

    def __str__(self) -> str:
        return (
            f"{self.tensor}{show(self.box)}: rank {self.src_rank} {self.src_param}{show(self.src_box)} -> "
            f"destination {self.dst} {self.dst_param}{show(self.dst_box)}"
        )


@dataclass(frozen=True)
class TrainingShards:
    """The training side: the weight table of each distinct shard, and the ranks that hold it."""

    tables: tuple[tuple[tuple[LocalParam, ...], ...], ...]
    """[shard][chunk]: parameters."""
    ranks: tuple[tuple[int, ...], ...]
    """[shard]: the ranks with exactly these weights."""

    @cached_property
    def world_size(self) -> int:
        """Number of training ranks."""
        return sum(map(len, self.ranks))


@dataclass(frozen=True)
class Destination:
    """One engine index on one device."""

    number: int
    index: int
    """Tensor-parallel rank in its engines; with one index a plan may also feed something that is no engine."""
    device: int | None
    """Device it shares with training ranks; None where engines have devices of their own."""
    engines: tuple[int, ...]
    """The engines that take these bytes from here."""


@dataclass(frozen=True)
class Bundle:
    """Blocks needed by one index that the same ranks hold."""

    holders: tuple[int, ...]
    cells: tuple[Cell, ...]

    @cached_property
    def elements(self) -> int:
        """Size of all its blocks."""
        return sum(cell.elements for cell in self.cells)


@dataclass(frozen=True)
class Share:
    """What one sender sends of a bundle to one destination: part `part` of `parts`."""

    sender: int
    part: int
    parts: int


@dataclass(frozen=True)
class ReshardPlan:
    """The whole movement of one sync; computed once, replayed every step."""

    shards: TrainingShards
    sites: Sites
    engine_tables: tuple[tuple[LocalParam, ...], ...]
    """[index]: the engine's parameters."""
    destinations: tuple[Destination, ...]
    bundles: tuple[tuple[Bundle, ...], ...]
    """[index]."""
    shares: tuple[tuple[tuple[Share, ...], ...], ...]
    """[destination][bundle]: who sends what of it."""

    def ops_to(self, dst: int) -> Iterator[TransferOp]:
        """All ops to a destination."""
        return self._ops(dst, None)

    def ops_from(self, rank: int, dst: int) -> Iterator[TransferOp]:
        """The ops of one sender to a destination."""
        return self._ops(dst, rank)

    def senders_to(self, dst: int) -> list[int]:
        """The ranks that send anything to a destination."""
        index = self.destinations[dst].index
        return sorted(
            {
                share.sender
                for number, shares in enumerate(self.shares[dst])
                for share in shares
                if self._part(index, number, share)  # a bundle may have fewer rows than parts
            }
        )

    def _ops(self, dst: int, only: int | None) -> Iterator[TransferOp]:
        index = self.destinations[dst].index
        table = self.engine_tables[index]
        for number, shares in enumerate(self.shares[dst]):
            for share in shares:
                if only is None or share.sender == only:
                    for cell in self._part(index, number, share):
                        source = next(
                            s for s in cell.sources if share.sender in self.shards.ranks[s.shard]
                        )
                        yield TransferOp(
                            share.sender, source.chunk, source.param, source.box,
                            dst, table[cell.param].name, cell.param_box, cell.tensor, cell.box,
                        )  # fmt: skip

    def _part(self, index: int, number: int, share: Share) -> tuple[Cell, ...]:
        if share.parts == 1:
            return self.bundles[index][number].cells
        key = (index, number, share.parts)
        if key not in self._parts:
            self._parts[key] = _cut(self.bundles[index][number], share.parts)
        return self._parts[key][share.part]

    @cached_property
    def _parts(self) -> dict[tuple[int, int, int], list[tuple[Cell, ...]]]:
        return {}

    @cached_property
    def traffic(self) -> Traffic:
        """Elements by destination and by rank."""
        needed, local, ops, sent = [], [], [], [0] * self.shards.world_size
        for place in self.destinations:
            bundles = self.bundles[place.index]
            needed.append(sum(bundle.elements for bundle in bundles))
            kept = count = 0
            for number, shares in enumerate(self.shares[place.number]):
                for share in shares:
                    part = self._part(place.index, number, share)
                    count += len(part)
                    size = (
                        bundles[number].elements
                        if share.parts == 1
                        else sum(cell.elements for cell in part)
                    )
                    if self.sites.device_of_rank[share.sender] == place.device:
                        kept += size
                    else:
                        sent[share.sender] += size
            local.append(kept)
            ops.append(count)
        received = tuple(n - k for n, k in zip(needed, local, strict=True))
        return Traffic(tuple(needed), tuple(local), received, tuple(sent), tuple(ops))

    def lower_bound(self, dst: int) -> int:
        """Elements that the device of `dst` does not hold of what its index needs: no plan can receive fewer."""
        place = self.destinations[dst]
        needed = self.traffic.needed[dst]
        return needed if place.device is None else needed - self._held[place.device, place.index]

    @cached_property
    def _held(self) -> Mapping[tuple[int, int], int]:
        return _held(self.bundles, self.sites)


@dataclass(frozen=True)
class Traffic:
    """Sizes of a plan in elements (bytes are these x the size of the engine's dtype)."""

    needed: tuple[int, ...]
    """By destination: what it needs, each element once."""
    local: tuple[int, ...]
    """By destination: what is on its own device already."""
    received: tuple[int, ...]
    """By destination: what crosses from another device."""
    sent: tuple[int, ...]
    """By training rank: what it sends to other devices."""
    ops: tuple[int, ...]
    """By destination: number of ops."""


def build_plan(
    shards: TrainingShards,
    engine_tables: Sequence[Sequence[LocalParam]],
    sites: Sites,
    engines: int,
    colocated: bool,
    devices: Sequence[tuple[int, ...]] | None = None,
) -> ReshardPlan:
    """Plan the sync of `engines` engines whose tensor-parallel index i needs `engine_tables[i]`.

    `devices` puts the ranks of colocated engines on given devices instead of the best. Raises ValueError when colocated
    engines find no room (see `assign_engines`), and AssertionError when the training side does not hold a block exactly
    once.
    """
    sources = _sources(shards)
    tables = tuple(tuple(table) for table in engine_tables)
    bundles = tuple(_bundles(table, sources, shards) for table in tables)
    if colocated:
        held = _held(bundles, sites)
        best = devices or assign_engines(
            sites, engines, len(tables), lambda device, index: held[device, index]
        )
        destinations = _destinations(best)
    else:
        each = [(engine, index) for engine in range(engines) for index in range(len(tables))]
        destinations = tuple(
            Destination(i, index, None, (engine,)) for i, (engine, index) in enumerate(each)
        )
    shares = _share_out(destinations, bundles, sites)
    return ReshardPlan(shards, sites, tables, destinations, bundles, shares)


def _sources(shards: TrainingShards) -> dict[str, dict[Box, list[Source]]]:
    """Tensor -> block -> where it lies."""
    found: dict[str, dict[Box, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for shard, chunks in enumerate(shards.tables):
        for chunk, params in enumerate(chunks):
            for param in params:
                for piece in param.pieces:
                    source = Source(shard, chunk, param.name, piece.local_box)
                    found[piece.hf_name][piece.hf_box].append(source)
    return found


def _bundles(
    table: Sequence[LocalParam],
    sources: Mapping[str, Mapping[Box, list[Source]]],
    shards: TrainingShards,
) -> tuple[Bundle, ...]:
    cells: dict[tuple[int, ...], list[Cell]] = defaultdict(list)
    for number, param in enumerate(table):
        for piece in param.pieces:
            covered = 0
            for held, places in sources.get(piece.hf_name, {}).items():
                common = intersect(held, piece.hf_box)
                if common is None:
                    continue
                covered += volume(common)
                inner = tuple(_within(source, held, common) for source in places)
                cell = Cell(piece.hf_name, common, number, locate(piece, common), inner)
                cells[tuple(sorted({source.shard for source in inner}))].append(cell)
            assert covered == volume(piece.hf_box), (
                f"training ranks hold {covered} of the {volume(piece.hf_box)} elements of "
                f"{piece.hf_name}{show(piece.hf_box)}, which {param.name} needs"
            )
    return tuple(
        Bundle(
            tuple(sorted(rank for shard in holding for rank in shards.ranks[shard])), tuple(some)
        )
        for holding, some in sorted(cells.items())
    )


def _within(source: Source, held: Box, part: Box) -> Source:
    if part == held:
        return source
    lead = len(source.box) - len(held)
    box = source.box[:lead] + tuple(
        (own + a - start, own + b - start)
        for (own, _), (start, _), (a, b) in zip(source.box[lead:], held, part, strict=True)
    )
    return Source(source.shard, source.chunk, source.param, box)


def _held(bundles: Sequence[Sequence[Bundle]], sites: Sites) -> Mapping[tuple[int, int], int]:
    """(device, index) -> elements that the device's ranks hold of what the index needs."""
    held: dict[tuple[int, int], int] = defaultdict(int)
    for index, some in enumerate(bundles):
        for bundle in some:
            for device in {sites.device_of_rank[rank] for rank in bundle.holders}:
                held[device, index] += bundle.elements
    return held


def _destinations(devices: Sequence[tuple[int, ...]]) -> tuple[Destination, ...]:
    """One destination a (device, index): engines there share it."""
    engines: dict[tuple[int, int], list[int]] = defaultdict(list)
    for engine, of_index in enumerate(devices):
        for index, device in enumerate(of_index):
            engines[device, index].append(engine)
    return tuple(
        Destination(number, index, device, tuple(some))
        for number, ((device, index), some) in enumerate(sorted(engines.items()))
    )


def _share_out(
    destinations: Sequence[Destination], bundles: Sequence[Sequence[Bundle]], sites: Sites
) -> tuple[tuple[tuple[Share, ...], ...], ...]:
    """Choose the senders of every bundle to every destination, so that those of a pool send equally much."""
    demand: dict[tuple[int, ...], int] = defaultdict(int)
    for place in destinations:
        for number, bundle in enumerate(bundles[place.index]):
            pool = _pool(bundle.holders, place, sites)
            demand[(place.index, number, *pool)] += 1
    taken: dict[tuple[int, ...], int] = defaultdict(int)
    shares = []
    for place in destinations:
        row = []
        for number, bundle in enumerate(bundles[place.index]):
            pool = _pool(bundle.holders, place, sites)
            key = (place.index, number, *pool)
            # n destinations x this many parts is the least multiple of the pool's size: all send equally often.
            parts = len(pool) // gcd(demand[key], len(pool))
            start = taken[key]
            taken[key] += parts
            row.append(
                tuple(Share(pool[(start + part) % len(pool)], part, parts) for part in range(parts))
            )
        shares.append(tuple(row))
    return tuple(shares)


def _pool(holders: tuple[int, ...], place: Destination, sites: Sites) -> tuple[int, ...]:
    """The holders nearest to a destination: on its device, else on its node, else all."""
    if place.device is None:
        return holders
    here = tuple(rank for rank in holders if sites.device_of_rank[rank] == place.device)
    node = sites.node_of_device[place.device]
    return here or tuple(rank for rank in holders if sites.node_of_rank(rank) == node) or holders


def _cut(bundle: Bundle, parts: int) -> list[tuple[Cell, ...]]:
    """The bundle's cells in `parts` lists of nearly equal size; large cells are cut by rows."""
    limit = max(1, bundle.elements // (4 * parts))
    pieces = [
        small for cell in bundle.cells for small in _split_cell(cell, -(-cell.elements // limit))
    ]
    sizes, lists = [0] * parts, [[] for _ in range(parts)]  # type: list[int], list[list[Cell]]
    for cell in sorted(pieces, key=lambda cell: -cell.elements):
        least = sizes.index(min(sizes))
        sizes[least] += cell.elements
        lists[least].append(cell)
    return [tuple(sorted(some, key=lambda cell: (cell.param, cell.param_box))) for some in lists]


def _split_cell(cell: Cell, parts: int) -> list[Cell]:
    if parts == 1:
        return [cell]
    row = len(cell.param_box) - len(cell.box)
    pieces = []
    for box in split_rows(cell.box, parts):
        (a, b), start = box[0], cell.box[0][0]
        place = _cut_dim(cell.param_box, row, a - start, b - start)
        sources = tuple(
            s._replace(box=_cut_dim(s.box, len(s.box) - len(cell.box), a - start, b - start))
            for s in cell.sources
        )
        pieces.append(Cell(cell.tensor, box, cell.param, place, sources))
    return pieces


def _cut_dim(box: Box, dim: int, a: int, b: int) -> Box:
    start = box[dim][0]
    return (*box[:dim], (start + a, start + b), *box[dim + 1 :])
