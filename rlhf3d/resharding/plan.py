"""The reshard plan: which training rank sends which block of a parameter to which engine rank.

Invariant: the ops to a destination tile every block its engine rank needs exactly once, each sent
by one rank that holds it: on the destination's own device if there is one, else on its node, else
any, in equal shares. Pure: no torch, no process.

A destination is one tensor-parallel index of vLLM on one device; engines on a device that need the
same bytes share it. Blocks held by the same set of ranks and needed by the same index form a
group: who sends is settled a group at a time, so that a plan for a thousand ranks stays small and
its ops are made when they are asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
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


class Block(NamedTuple):
    """A block that some training shards hold complete and one engine index needs complete."""

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
            f"{self.tensor}{show(self.box)}: rank {self.src_rank} "
            f"{self.src_param}{show(self.src_box)} -> destination {self.dst} "
            f"{self.dst_param}{show(self.dst_box)}"
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
    """Tensor-parallel rank in its engines.

    With one index a plan may also feed something that is no engine.
    """
    device: int | None
    """Device it shares with training ranks; None where engines have devices of their own."""
    engines: tuple[int, ...]
    """The engines that take these bytes from here."""


@dataclass(frozen=True)
class HeldBlocks:
    """Blocks needed by one index that the same ranks hold."""

    holders: tuple[int, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def elements(self) -> int:
        """Size of all its blocks."""
        return sum(block.elements for block in self.blocks)


@dataclass(frozen=True)
class SendShare:
    """What one sender sends of a group to one destination: part `part` of `parts`."""

    sender: int
    part: int
    parts: int


@dataclass(frozen=True)
class ReshardPlan:
    """All that moves in one sync; computed once, replayed every step."""

    shards: TrainingShards
    sites: Sites
    engine_tables: tuple[tuple[LocalParam, ...], ...]
    """[index]: the engine's parameters."""
    destinations: tuple[Destination, ...]
    groups: tuple[tuple[HeldBlocks, ...], ...]
    """[index]."""
    shares: tuple[tuple[tuple[SendShare, ...], ...], ...]
    """[destination][group]: who sends what of it."""

    def ops_to(self, dst: int) -> Iterator[TransferOp]:
        """All ops to a destination."""
        return self._ops(dst, None)

    def ops_from(self, rank: int, dst: int) -> Iterator[TransferOp]:
        """The ops of one sender to a destination."""
        return self._ops(dst, rank)

    def senders_to(self, dst: int) -> list[int]:
        """The ranks that send anything to a destination."""
        index = self.destinations[dst].index
        senders = set()
        for number, shares in enumerate(self.shares[dst]):
            for share in shares:
                # A group may have fewer rows than parts: then some shares are empty.
                if self._part(index, number, share):
                    senders.add(share.sender)
        return sorted(senders)

    def _ops(self, dst: int, only: int | None) -> Iterator[TransferOp]:
        index = self.destinations[dst].index
        table = self.engine_tables[index]
        for number, shares in enumerate(self.shares[dst]):
            for share in shares:
                if only is not None and share.sender != only:
                    continue
                for block in self._part(index, number, share):
                    source = self._source_on(share.sender, block)
                    yield TransferOp(
                        src_rank=share.sender,
                        src_chunk=source.chunk,
                        src_param=source.param,
                        src_box=source.box,
                        dst=dst,
                        dst_param=table[block.param].name,
                        dst_box=block.param_box,
                        tensor=block.tensor,
                        box=block.box,
                    )

    def _source_on(self, rank: int, block: Block) -> Source:
        """Where a rank that holds a block has it."""
        # Shards share no rank, so at most one source is on it.
        return next(s for s in block.sources if rank in self.shards.ranks[s.shard])

    def _part(self, index: int, number: int, share: SendShare) -> tuple[Block, ...]:
        """The blocks of a share of group `number`."""
        if share.parts == 1:
            return self.groups[index][number].blocks
        # Cutting a group looks at each of its blocks: done once for all destinations.
        key = (index, number, share.parts)
        if key not in self._parts:
            self._parts[key] = _cut(self.groups[index][number], share.parts)
        return self._parts[key][share.part]

    @cached_property
    def _parts(self) -> dict[tuple[int, int, int], list[tuple[Block, ...]]]:
        # A frozen dataclass allows this: `cached_property` writes to `__dict__` directly.
        return {}

    @cached_property
    def traffic(self) -> Traffic:
        """Elements by destination and by rank."""
        needed, local, ops, sent = [], [], [], [0] * self.shards.world_size
        for place in self.destinations:
            groups = self.groups[place.index]
            needed.append(sum(group.elements for group in groups))
            kept = count = 0
            for number, shares in enumerate(self.shares[place.number]):
                for share in shares:
                    part = self._part(place.index, number, share)
                    count += len(part)
                    if share.parts == 1:  # its group knows its size
                        size = groups[number].elements
                    else:
                        size = sum(block.elements for block in part)
                    if self.sites.device_of_rank[share.sender] == place.device:
                        kept += size
                    else:
                        sent[share.sender] += size
            local.append(kept)
            ops.append(count)
        received = tuple(n - k for n, k in zip(needed, local, strict=True))
        return Traffic(tuple(needed), tuple(local), received, tuple(sent), tuple(ops))

    def lower_bound(self, dst: int) -> int:
        """The fewest elements that any plan can move to `dst`: what its device does not hold."""
        place = self.destinations[dst]
        needed = self.traffic.needed[dst]
        return needed if place.device is None else needed - self._held[place.device, place.index]

    @cached_property
    def _held(self) -> Mapping[tuple[int, int], int]:
        return _held(self.groups, self.sites)


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

    `devices` puts the ranks of colocated engines on given devices instead of the best. Raises
    ValueError when colocated engines find no room (see `assign_engines`), and AssertionError when
    the training side does not hold a block exactly once.
    """
    sources = _sources(shards)
    # Every process plans for itself, so nothing here may depend on anything but the arguments.
    tables = tuple(tuple(table) for table in engine_tables)
    groups = tuple(_group_by_holders(table, sources, shards) for table in tables)
    if colocated:
        held = _held(groups, sites)
        best = devices or assign_engines(
            sites, engines, len(tables), lambda device, index: held[device, index]
        )
        destinations = _destinations(best)
    else:
        # Engine by engine: message ranks are numbered in this order (`SyncSetup.message_ranks`).
        each = product(range(engines), range(len(tables)))
        destinations = tuple(
            Destination(i, index, None, (engine,)) for i, (engine, index) in enumerate(each)
        )
    shares = _share_out(destinations, groups, sites)
    return ReshardPlan(shards, sites, tables, destinations, groups, shares)


def _sources(shards: TrainingShards) -> dict[str, dict[Box, list[Source]]]:
    """Tensor -> block -> where it lies."""
    found: dict[str, dict[Box, list[Source]]] = defaultdict(lambda: defaultdict(list))
    for shard, chunks in enumerate(shards.tables):
        for chunk, params in enumerate(chunks):
            for param in params:
                # Whether `primary` or not: any replica may send.
                for piece in param.pieces:
                    source = Source(shard, chunk, param.name, piece.local_box)
                    found[piece.hf_name][piece.hf_box].append(source)
    return found


def _group_by_holders(
    table: Sequence[LocalParam],
    sources: Mapping[str, Mapping[Box, list[Source]]],
    shards: TrainingShards,
) -> tuple[HeldBlocks, ...]:
    """What an engine index needs, cut where the training side is cut and sorted by who holds it.

    Asserts that the training side holds every element exactly once.
    """
    blocks: dict[tuple[int, ...], list[Block]] = defaultdict(list)
    for number, param in enumerate(table):
        for piece in param.pieces:
            # Replicas hold the same box, which is one key of `sources`, so no element counts twice.
            covered = 0
            for held, places in sources.get(piece.hf_name, {}).items():
                common = intersect(held, piece.hf_box)
                if common is None:
                    continue
                covered += volume(common)
                inner = tuple(_within(source, held, common) for source in places)
                block = Block(piece.hf_name, common, number, locate(piece, common), inner)
                # The key is short where the ranks of these shards would be thousands.
                blocks[tuple(sorted({source.shard for source in inner}))].append(block)
            assert covered == volume(piece.hf_box), (
                f"training ranks hold {covered} of the {volume(piece.hf_box)} elements of "
                f"{piece.hf_name}{show(piece.hf_box)}, which {param.name} needs"
            )
    groups = []
    for holding, of_shards in sorted(blocks.items()):
        # A rank holds one shard, so no rank appears twice.
        holders = sorted(chain.from_iterable(shards.ranks[shard] for shard in holding))
        groups.append(HeldBlocks(tuple(holders), tuple(of_shards)))
    return tuple(groups)


def _within(source: Source, held: Box, part: Box) -> Source:
    """The part `part` of a source that holds the block `held` of a tensor."""
    # The usual case, and sources are shared instead of made again.
    if part == held:
        return source
    # A stacked parameter (experts) has leading dimensions that the tensor lacks.
    lead = len(source.box) - len(held)
    box = source.box[:lead] + tuple(
        (own + a - start, own + b - start)
        for (own, _), (start, _), (a, b) in zip(source.box[lead:], held, part, strict=True)
    )
    return Source(source.shard, source.chunk, source.param, box)


def _held(groups: Sequence[Sequence[HeldBlocks]], sites: Sites) -> Mapping[tuple[int, int], int]:
    """(device, index) -> elements that the device's ranks hold of what the index needs."""
    held: dict[tuple[int, int], int] = defaultdict(int)
    for index, of_index in enumerate(groups):
        for group in of_index:
            # A set: ranks of one device that hold the same block bring nothing twice.
            for device in {sites.device_of_rank[rank] for rank in group.holders}:
                held[device, index] += group.elements
    return held


def _destinations(devices: Sequence[tuple[int, ...]]) -> tuple[Destination, ...]:
    """One destination a (device, index): engines there share it."""
    engines: dict[tuple[int, int], list[int]] = defaultdict(list)
    for engine, of_index in enumerate(devices):
        for index, device in enumerate(of_index):
            engines[device, index].append(engine)
    return tuple(
        Destination(number, index, device, tuple(of_device))
        for number, ((device, index), of_device) in enumerate(sorted(engines.items()))
    )


def _share_out(
    destinations: Sequence[Destination], groups: Sequence[Sequence[HeldBlocks]], sites: Sites
) -> tuple[tuple[tuple[SendShare, ...], ...], ...]:
    """Choose who sends every group to every destination; those of a pool send equally much."""
    # 1. How many destinations draw each group from each pool.
    demand: dict[tuple[int, ...], int] = defaultdict(int)
    for place in destinations:
        for number, group in enumerate(groups[place.index]):
            pool = _pool(group.holders, place, sites)
            demand[(place.index, number, *pool)] += 1
    # 2. Deal out each pool in turn: a destination starts where the one before it stopped.
    taken: dict[tuple[int, ...], int] = defaultdict(int)
    shares = []
    for place in destinations:
        row = []
        for number, group in enumerate(groups[place.index]):
            pool = _pool(group.holders, place, sites)
            key = (place.index, number, *pool)
            # n destinations x this many parts is the least multiple of the pool's size: all send
            # equally often.
            parts = len(pool) // gcd(demand[key], len(pool))
            start = taken[key]
            taken[key] += parts
            senders = [pool[(start + part) % len(pool)] for part in range(parts)]
            row.append(tuple(SendShare(sender, part, parts) for part, sender in enumerate(senders)))
        shares.append(tuple(row))
    return tuple(shares)


def _pool(holders: tuple[int, ...], place: Destination, sites: Sites) -> tuple[int, ...]:
    """The holders nearest to a destination: on its device, else on its node, else all."""
    if place.device is None:
        return holders
    on_device = tuple(rank for rank in holders if sites.device_of_rank[rank] == place.device)
    node = sites.node_of_device[place.device]
    on_node = tuple(rank for rank in holders if sites.node_of_rank(rank) == node)
    # All of the nearest, so that replicas share the work.
    return on_device or on_node or holders


def _cut(group: HeldBlocks, parts: int) -> list[tuple[Block, ...]]:
    """The group's blocks in `parts` lists of nearly equal size; large blocks are cut by rows."""
    # Blocks of a quarter of a part can be dealt out evenly.
    limit = max(1, group.elements // (4 * parts))
    pieces: list[Block] = []
    for block in group.blocks:
        pieces += _split_block(block, -(-block.elements // limit))
    sizes = [0] * parts
    lists: list[list[Block]] = [[] for _ in range(parts)]
    # The largest first, each to the part that has least.
    for block in sorted(pieces, key=lambda block: -block.elements):
        least = sizes.index(min(sizes))
        sizes[least] += block.elements
        lists[least].append(block)
    return [tuple(sorted(blocks, key=_place_in_engine)) for blocks in lists]


def _place_in_engine(block: Block) -> tuple[int, Box]:
    """Blocks in the order of the engine's parameters fill its buckets from front to back."""
    return block.param, block.param_box


def _split_block(block: Block, parts: int) -> list[Block]:
    """A block cut by rows into at most `parts`."""
    if parts == 1:
        return [block]
    # The dimension of rows: packed experts have leading dimensions that the tensor lacks.
    row = len(block.param_box) - len(block.box)
    pieces = []
    for box in split_rows(block.box, parts):
        (a, b), start = box[0], block.box[0][0]
        place = _cut_dim(block.param_box, row, a - start, b - start)
        sources = []
        for source in block.sources:
            source_row = len(source.box) - len(block.box)
            sources.append(
                source._replace(box=_cut_dim(source.box, source_row, a - start, b - start))
            )
        pieces.append(Block(block.tensor, box, block.param, place, tuple(sources)))
    return pieces


def _cut_dim(box: Box, dim: int, a: int, b: int) -> Box:
    """A box whose dimension `dim` is cut to its own positions a to b."""
    start = box[dim][0]
    return (*box[:dim], (start + a, start + b), *box[dim + 1 :])
