"""The training side of a sync: a rank copies its blocks into destinations' buckets.

Invariant: a rank sends exactly the copies of the plan, cast to the receiver's dtype, each with the
policy version and the fingerprint of what it sent; no tensor is gathered anywhere.

A destination on the sender's own device is reached through shared memory. A remote one gets
messages: on a dedicated device it receives them itself; on a device that also trains, the training
rank that owns the destination's shared memory relays them into it. Buckets are counted within a
sync (`number`) and since the shared memory was made (`counted`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from rlhf3d.models.boxes import box_slices, volume
from rlhf3d.observability.profile.recorder import span
from rlhf3d.resharding.buckets import Copy
from rlhf3d.resharding.fingerprints import Fingerprint, fetched, fingerprint
from rlhf3d.resharding.messages import Group, MessageLayout
from rlhf3d.resharding.ring import Ring
from rlhf3d.resharding.setup import SLOTS, SyncSetup

Params = Mapping[tuple[int, str], torch.Tensor]
"""(model chunk, parameter name) -> local weights."""
ReadBlock = Callable[[Copy], tuple[torch.Tensor, Fingerprint]]
"""The block of a copy in the receiver's dtype, and its fingerprint."""


Sent = tuple[Any, torch.Tensor, int]
"""A message under way, which must live until it is finished, and whom it goes to."""


@dataclass(frozen=True)
class SendReport:
    """What one rank did in one sync."""

    sent_bytes: int
    """Written for all destinations."""
    send_s: float
    """Seconds in all, waiting for readers included."""


class WeightSender:
    """One training rank's end of a stream."""

    def __init__(self, setup: SyncSetup, rank: int, params: Params) -> None:
        """Make the shared memory this rank owns; `open` comes when all ranks have done so.

        `params` are read again at each sync.
        """
        self.setup, self.rank, self.params = setup, rank, params
        self.group: Group | None = None
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        # gloo sends from host memory.
        self._device = (
            next(iter(params.values())).device if setup.weights_on_gpu else torch.device("cpu")
        )
        self._rings: dict[int, Ring] = {}
        self._near: list[_RingOutbox] = []
        self._far: list[_MessageOutbox] = []
        self._relays: list[_Relay] = []
        # Rings are made before any is opened: `open` on another rank must find the file.
        self._shared = [d.number for d in setup.plan.destinations if d.device is not None]
        for dst in self._shared:
            if setup.owner(dst) == rank:
                self._rings[dst] = Ring.create(setup.ring_shape(dst))

    def open(self, group: Group | None = None) -> None:
        """Open what others own, and get ready to send.

        `group` carries the messages, where there are any.
        """
        setup, rank = self.setup, self.rank
        self.group = group
        for place in setup.plan.destinations:
            dst, senders = place.number, setup.plan.senders_to(place.number)
            owner = None if place.device is None else setup.owner(dst)
            if rank in senders and setup.is_near(rank, dst):
                ring = self._rings.get(dst) or self._rings.setdefault(
                    dst, Ring.open(setup.ring_shape(dst))
                )
                self._near.append(
                    _RingOutbox(ring, senders.index(rank), setup.copies(dst, rank), self.dtype)
                )
            elif rank in senders:
                # Dedicated engine ranks follow the training ranks in the group, one a destination.
                peer = setup.plan.shards.world_size + dst if owner is None else owner
                self._far.append(_MessageOutbox(setup, dst, rank, peer, self.dtype, self._device))
            if rank == owner:
                far = [sender for sender in senders if not setup.is_near(sender, dst)]
                self._relays += [
                    _Relay(
                        setup, dst, sender, senders.index(sender), self._rings[dst], self._device
                    )
                    for sender in far
                ]
        assert self.group or not (self._far or self._relays), "messages need a group"

    def seal(self) -> None:
        """Remove the names of this rank's shared memory: every process has opened it."""
        for dst in self._shared:
            if self.setup.owner(dst) == self.rank:
                self._rings[dst].unlink()

    @torch.no_grad()
    def send(self, policy_version: int, sync: int) -> SendReport:
        """Send this rank's blocks for `policy_version`.

        `sync` counts the syncs of this stream from 0.
        """
        # On CPU the engine's threads need the cores meanwhile: its packing takes the longest.
        with one_thread():
            return self._send(policy_version, sync)

    def _send(self, policy_version: int, sync: int) -> SendReport:
        start = time.monotonic()
        # New for each sync: fingerprints of the last one's weights are void.
        block = self._blocks()
        # Destinations differ in their number of buckets; who has none left is skipped below.
        rounds = [near.rounds for near in self._near] + [far.rounds for far in self._far]
        rounds += [relay.rounds for relay in self._relays]
        unfinished: list[list[Sent]] = []
        # All ranks go through the buckets in one order, or they could wait for each other forever.
        for number in range(max(rounds, default=0)):
            # Each bucket has a deadline of its own: a large model does not need a longer one.
            deadline = time.monotonic() + self.setup.timeout_s
            for near in self._near:
                near.send(number, sync, policy_version, block, deadline)
            if self.group is None:
                continue
            if len(unfinished) == 2:  # the messages of two buckets are under way at most
                self._finish(unfinished.pop(0), deadline)
            sends = [
                (far.fill(number, policy_version, block), far.peer)
                for far in self._far
                if far.has(number)
            ]
            # Without a block in this bucket a sender sends no message: `empty` then has no bytes.
            relays = [(r, r.empty(number)) for r in self._relays if number < r.rounds]
            coming = [(message, relay.sender) for relay, message in relays if len(message)]
            # One call for both directions: see `Group.exchange`.
            started = self.group.exchange(sends, coming)
            # `exchange` gives the works of the sends first, then those of the receives.
            sent = zip(started[: len(sends)], sends, strict=True)
            unfinished.append([(work, *post) for work, post in sent])
            arriving = iter(started[len(sends) :])
            # A relay forwards empty buckets too: the readers count one of every sender.
            for relay, message in relays:
                if len(message):
                    self.group.finish(next(arriving), relay.sender, "a message from", deadline)
                relay.forward(number, sync, message, deadline)
        for works in unfinished:
            self._finish(works, time.monotonic() + self.setup.timeout_s)
        num_bytes = sum(near.num_bytes for near in self._near)
        num_bytes += sum(far.num_bytes for far in self._far)
        return SendReport(num_bytes, time.monotonic() - start)

    def close(self) -> None:
        """Give up the shared memory and the messages' group."""
        self.seal()
        # They refer to the rings, whose mapping cannot be closed under a view.
        self._near, self._far, self._relays, self.group = [], [], [], None
        for ring in self._rings.values():
            # What an error's frames still hold goes with them.
            with suppress(BufferError):
                ring.close()

    def _finish(self, works: list[Sent], deadline: float) -> None:
        assert self.group is not None
        with span("wait for a message to arrive", "wait"):
            for work, _, peer in works:
                self.group.finish(work, peer, "a message to", deadline)

    def _blocks(self) -> ReadBlock:
        """Blocks of this sync.

        A fingerprint is computed once however many destinations the block has.
        """
        known: dict[tuple[Any, ...], Fingerprint] = {}

        def block(copy: Copy) -> tuple[torch.Tensor, Fingerprint]:
            param = self.params[copy.src_chunk, copy.src_param]
            # Cast before the fingerprint: it is of the bits that travel.
            tensor = param[box_slices(copy.src_box)]
            if tensor.dtype != self.dtype:
                tensor = tensor.to(self.dtype)
            # The box in the tensor, on which a fingerprint depends too, follows from these.
            key = (copy.src_chunk, copy.src_param, copy.src_box)
            if key not in known:
                known[key] = fingerprint(tensor, copy.hf_box)
            return tensor, known[key]

        return block


def _bytes_of(copies: list[list[Copy]], dtype: torch.dtype) -> int:
    elements = sum(volume(copy.box) for copy in chain.from_iterable(copies))
    return elements * dtype.itemsize


class _RingOutbox:
    """Writes into the shared memory of one destination."""

    def __init__(
        self, ring: Ring, position: int, copies: list[list[Copy]], dtype: torch.dtype
    ) -> None:
        self.ring, self.position, self.copies, self.dtype = ring, position, copies, dtype
        self.rounds, self.num_bytes = len(copies), _bytes_of(copies, dtype)

    def send(self, number: int, sync: int, version: int, block: ReadBlock, deadline: float) -> None:
        if number >= self.rounds:
            return
        # The ring's counters go on from sync to sync; only the table's rows begin again.
        counted = sync * self.rounds + number
        _wait_free(self.ring, counted, self.rounds, deadline)
        slot, copies = elements(self.ring.slot(counted), self.dtype), self.copies[number]
        with span("pack", "transfer", bucket=number):
            checksums = []
            for copy in copies:
                # The fingerprint comes first, and brings the block into the processor's cache.
                tensor, checksum = block(copy)
                view_in(slot, copy).copy_(tensor)
                checksums.append(checksum)
            if copies:
                table = _table(version, checksums)
                self.ring.record(self.position, [copy.row for copy in copies], table)
        # Last, and also without a copy in this bucket: readers wait for the count of every sender.
        self.ring.fill(self.position, counted)


class _MessageOutbox:
    """Writes messages to one destination."""

    def __init__(
        self,
        setup: SyncSetup,
        dst: int,
        rank: int,
        peer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        copies = setup.copies(dst, rank)
        self.peer, self.dtype = peer, dtype
        self.rounds, self.num_bytes = len(copies), _bytes_of(copies, dtype)
        self.layouts = MessageLayout.by_bucket(copies, dtype.itemsize)
        self.device = device

    def has(self, number: int) -> bool:
        """Whether there is a message for this bucket."""
        return number < self.rounds and bool(self.layouts[number].copies)

    def fill(self, number: int, version: int, block: ReadBlock) -> torch.Tensor:
        layout = self.layouts[number]
        # Of its own for each bucket: the last ones may still be under way.
        message = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self.device)
        with span("pack", "transfer", bucket=number, bytes=layout.num_bytes):
            checksums = []
            for i, copy in enumerate(layout.copies):
                tensor, checksum = block(copy)
                layout.block(message, i, self.dtype).copy_(tensor)
                checksums.append(checksum)
            layout.table(message).copy_(_table(version, checksums))
        return message


class _Relay:
    """Passes one far sender's messages on into the shared memory of a destination."""

    def __init__(
        self,
        setup: SyncSetup,
        dst: int,
        sender: int,
        position: int,
        ring: Ring,
        device: torch.device,
    ) -> None:
        copies = setup.copies(dst, sender)
        self.sender, self.position, self.ring = sender, position, ring
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        self.rounds = len(copies)
        self.layouts = MessageLayout.by_bucket(copies, setup.item_bytes)
        self.device = device

    def empty(self, number: int) -> torch.Tensor:
        """Memory for this bucket's message."""
        return torch.empty(self.layouts[number].num_bytes, dtype=torch.uint8, device=self.device)

    def forward(self, number: int, sync: int, message: torch.Tensor, deadline: float) -> None:
        layout = self.layouts[number]
        counted = sync * self.rounds + number
        _wait_free(self.ring, counted, self.rounds, deadline)
        slot = elements(self.ring.slot(counted), self.dtype)
        for i, copy in enumerate(layout.copies):
            view_in(slot, copy).copy_(layout.block(message, i, self.dtype))
        if layout.copies:
            rows = [copy.row for copy in layout.copies]
            self.ring.record(self.position, rows, layout.table(message))
        self.ring.fill(self.position, counted)


def _wait_free(ring: Ring, counted: int, rounds: int, deadline: float) -> None:
    """Wait until the slot of bucket `counted`, and its rows of the table, have been read.

    A slot is used again after SLOTS buckets, but a row of the table after a complete sync: `rounds`
    buckets, which may be fewer.
    """
    with span("wait for readers", "wait"):
        ring.wait_free(max(counted, counted - rounds + SLOTS), deadline)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block with one of torch's CPU threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _table(version: int, checksums: Sequence[Fingerprint]) -> torch.Tensor:
    """(policy version, fingerprint) [copies, 2]; waits once for a device."""
    return torch.tensor([(version, checksum) for checksum in fetched(checksums)])


def elements(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bucket's bytes as elements; the last bytes may be too few for one."""
    return memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)


def view_in(slot: torch.Tensor, copy: Copy) -> torch.Tensor:
    """The place of a copy in its bucket, whose `elements` are given."""
    shape, strides, first = copy.place
    start = copy.offset // slot.element_size() + first
    return slot.as_strided(shape, strides, slot.storage_offset() + start)
