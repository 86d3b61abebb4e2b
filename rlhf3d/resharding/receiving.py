"""The receiving side of a sync: verified rows of parameters, bucket by bucket.

Invariant: nothing is handed on before it was proven: every copy of its bucket arrived, for the
wanted policy version, with the fingerprint that its sender computed; a copy that did not is refused
with tensor, block and sender.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rlhf3d.models.boxes import show
from rlhf3d.models.weights import LocalParam
from rlhf3d.observability.profile.recorder import span
from rlhf3d.resharding.buckets import Bucket, Copy, Segment, real_rows
from rlhf3d.resharding.fingerprints import fetched, fingerprint
from rlhf3d.resharding.messages import Group, MessageLayout
from rlhf3d.resharding.ring import Ring, SyncError
from rlhf3d.resharding.sending import elements, view_in
from rlhf3d.resharding.setup import SyncSetup

Arrival = tuple[Copy, int, int]
"""A copy with the policy version and fingerprint that its sender recorded."""


class Inbox(Protocol):
    """Where buckets come from; `number` counts the buckets of a sync."""

    def wait(self, number: int, sync: int, deadline: float) -> tuple[torch.Tensor, list[Arrival]]:
        """The bucket's memory and what came into it."""

    def done(self, number: int, sync: int) -> None:
        """The bucket's memory may be overwritten."""


class Writer(Protocol):
    """What takes the weights; see `rlhf3d.rollout.weight_writer.WeightWriter`."""

    def in_place(self, name: str) -> torch.Tensor | None:
        """Live storage of a parameter, or None where it must be given complete."""

    def load_packed(self, name: str, weight: torch.Tensor) -> None:
        """Take a complete parameter, whose memory may change afterwards."""

    def finish(self) -> None:
        """All parameters were given."""


class RingInbox:
    """Buckets in shared memory."""

    def __init__(self, setup: SyncSetup, dst: int, reader: int = 0) -> None:
        """`reader` is this process's place among the destination's engines."""
        self.ring, self.reader = Ring.open(setup.ring_shape(dst)), reader
        self.ring.hold(reader)
        self.copies = [setup.copies(dst, sender) for sender in setup.plan.senders_to(dst)]
        # Syncs have equally many buckets, so the ring's count follows from sync and number.
        self.rounds = len(setup.buckets(dst))

    def wait(self, number: int, sync: int, deadline: float) -> tuple[torch.Tensor, list[Arrival]]:
        counted = sync * self.rounds + number
        self.ring.wait_filled(counted, deadline)
        arrivals = []
        for position, copies in enumerate(self.copies):
            rows = [copy.row for copy in copies[number]]
            for copy, (version, checksum) in zip(
                copies[number], self.ring.recorded(position, rows), strict=True
            ):
                arrivals.append((copy, version, checksum))
        return self.ring.slot(counted), arrivals

    def done(self, number: int, sync: int) -> None:
        self.ring.take(self.reader, sync * self.rounds + number)

    def close(self) -> None:
        """Unmap the shared memory; what an error's frames still hold goes with the process."""
        with suppress(BufferError):
            self.ring.close()


class MessageInbox:
    """Buckets put together from messages; while one is read the next is on its way."""

    def __init__(self, setup: SyncSetup, dst: int, group: Group, device: torch.device) -> None:
        self.group, self.dtype = group, getattr(torch, setup.dtype)
        self.senders = setup.plan.senders_to(dst)
        self.layouts = [
            MessageLayout.by_bucket(setup.copies(dst, sender), setup.item_bytes)
            for sender in self.senders
        ]

        def memory_of_messages() -> list[torch.Tensor]:
            longest = map(_longest, self.layouts)
            return [torch.empty(size, dtype=torch.uint8, device=device) for size in longest]

        # One set is read while the other is filled.
        self.messages = (memory_of_messages(), memory_of_messages())
        self.rounds = len(setup.buckets(dst))
        self._coming: list[tuple[Any, int, MessageLayout, torch.Tensor]] = []
        self.slot = torch.empty(
            max(bucket.num_bytes for bucket in setup.buckets(dst)), dtype=torch.uint8, device=device
        )

    def wait(self, number: int, sync: int, deadline: float) -> tuple[torch.Tensor, list[Arrival]]:
        if number == 0:
            self._coming = self._start(0)
        # The next bucket's messages travel while this one is checked and loaded.
        coming, self._coming = self._coming, self._start(number + 1)
        arrivals: list[Arrival] = []
        for work, sender, layout, message in coming:
            self.group.finish(work, sender, "a message from", deadline)
            table, slot = layout.table(message).tolist(), elements(self.slot, self.dtype)
            for i, copy in enumerate(layout.copies):
                version, checksum = table[i]
                view_in(slot, copy).copy_(layout.block(message, i, self.dtype))
                arrivals.append((copy, version, checksum))
        return self.slot, arrivals

    def _start(self, number: int) -> list[tuple[Any, int, MessageLayout, torch.Tensor]]:
        """Start to receive a bucket's messages."""
        if number == self.rounds:
            return []
        coming = [
            (sender, layouts[number], memory[: layouts[number].num_bytes])
            for sender, layouts, memory in zip(
                self.senders, self.layouts, self.messages[number % 2], strict=True
            )
            # No block, no message: the sender sends none either.
            if layouts[number].copies
        ]
        works = self.group.exchange([], [(message, sender) for sender, _, message in coming])
        return [(work, *rest) for work, rest in zip(works, coming, strict=True)]

    def done(self, number: int, sync: int) -> None:
        """Messages own their memory."""

    def close(self) -> None:
        """Nothing is mapped."""


@dataclass
class ReceiveTimes:
    """Where the seconds of one sync went."""

    wait_s: float = 0.0
    """Until the senders had filled the buckets."""
    verify_s: float = 0.0
    """Fingerprints."""
    received_bytes: int = 0


def _longest(layouts: Sequence[MessageLayout]) -> int:
    """Bytes of the longest message of a sender."""
    return max(layout.num_bytes for layout in layouts)


class WeightReceiver:
    """One reader of a stream."""

    def __init__(self, setup: SyncSetup, dst: int, inbox: Inbox) -> None:
        self.setup, self.inbox = setup, inbox
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        self.table: Sequence[LocalParam] = setup.table(dst)
        self.buckets: Sequence[Bucket] = setup.buckets(dst)
        self.times = ReceiveTimes()

    def stream(self, policy_version: int, sync: int) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Verified segments in order; a tensor is valid until the next is asked for.

        Raises SyncError for anything missing, late, old or changed.
        """
        self.times = ReceiveTimes()
        for number, bucket in enumerate(self.buckets):
            start = time.perf_counter()
            deadline = time.monotonic() + self.setup.timeout_s
            with span("wait for senders", "wait", bucket=number):
                memory, arrivals = self.inbox.wait(number, sync, deadline)
            waited = time.perf_counter()
            self.times.wait_s += waited - start
            # All of a bucket before any of it is handed on.
            with span("verify", "transfer", bucket=number, bytes=bucket.num_bytes):
                slot = elements(memory, self.dtype)
                _check(slot, arrivals, policy_version)
            self.times.verify_s += time.perf_counter() - waited
            self.times.received_bytes += bucket.num_bytes
            for segment in bucket.segments:
                yield segment, self._view(slot, segment)
            # Reached when the next segment is asked for: the consumer is done with this bucket.
            self.inbox.done(number, sync)

    def load(self, writer: Writer, policy_version: int, sync: int) -> None:
        """Put a sync's weights into a live model as they come."""
        # One is enough: the segments of a parameter follow each other (`SyncSetup.buckets`).
        partial: torch.Tensor | None = None
        for segment, rows in self.stream(policy_version, sync):
            param = self.table[segment.param]
            # Live storage takes rows as they come, with no copy of the parameter in between.
            live = writer.in_place(param.name)
            if live is not None:
                live[slice(*segment.rows)].copy_(rows)
            elif segment.complete:
                writer.load_packed(param.name, rows)
            else:
                partial = self._assemble(partial, segment, rows)
                # Its last rows: what lies beyond is padding, which is not sent.
                if segment.rows[1] == real_rows(param):
                    writer.load_packed(param.name, partial)
                    partial = None
        writer.finish()

    def stream_params(
        self, policy_version: int, sync: int
    ) -> Iterator[tuple[LocalParam, torch.Tensor]]:
        """Verified complete parameters in order, padding zero.

        A tensor is valid until the next is asked for.
        """
        partial: torch.Tensor | None = None
        for segment, rows in self.stream(policy_version, sync):
            param = self.table[segment.param]
            if segment.complete:
                yield param, rows
                continue
            partial = self._assemble(partial, segment, rows)
            if segment.rows[1] == real_rows(param):
                yield param, partial
                partial = None
        for param in self.table:
            if not real_rows(param):  # a rank whose share of the vocabulary is all padding
                yield param, torch.zeros(param.shape, dtype=self.dtype)

    def _assemble(
        self, partial: torch.Tensor | None, segment: Segment, rows: torch.Tensor
    ) -> torch.Tensor:
        """A parameter that comes in several buckets, padding zero."""
        if partial is None:
            partial = torch.zeros(
                self.table[segment.param].shape, dtype=self.dtype, device=rows.device
            )
        partial[slice(*segment.rows)].copy_(rows)
        return partial

    def _view(self, slot: torch.Tensor, segment: Segment) -> torch.Tensor:
        start = segment.offset // self.dtype.itemsize
        return slot[start : start + math.prod(segment.shape)].view(segment.shape)


def _check(slot: torch.Tensor, arrivals: Sequence[Arrival], wanted: int) -> None:
    """Raise SyncError for the first copy in a bucket that is old, missing or changed."""
    found = [fingerprint(view_in(slot, copy), copy.hf_box) for copy, _, _ in arrivals]
    for (copy, version, checksum), own in zip(arrivals, fetched(found), strict=True):
        if version == wanted and own == checksum:
            continue
        where = f"{copy.tensor}{show(copy.hf_box)} from training rank {copy.sender}"
        if version == wanted:
            raise SyncError(
                f"sync_weights: {where} differs from what was sent for policy version {version}"
            )
        was = "was never sent" if version < 0 else f"is of policy version {version}"
        raise SyncError(f"sync_weights: {where} {was}; wanted policy version {wanted}")
