"""Weights between processes that share no memory, by messages over gloo or NCCL.

Invariant: there is one message per (sender, receiver, bucket): the blocks of it and their (policy
version, fingerprint), as the sender computed them, and there is none where a sender has no block in
a bucket; messages of a pair arrive in the order of buckets; each wait has a deadline that names who
is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhf3d.models.boxes import volume
from rlhf3d.parallel.meeting import host_meeting
from rlhf3d.parallel.nccl_rules import NCCLRules
from rlhf3d.resharding.buckets import Copy
from rlhf3d.resharding.fingerprints import box_shape
from rlhf3d.resharding.ring import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_ON_GPU_S,
    PAUSE_GROWTH,
    SyncError,
)
from rlhf3d.units import round_up

# A multiple of every dtype's size and of a fingerprint's word.
_ALIGN = 16
_CLOCK_S = 0.05
"""Backends round deadlines to milliseconds."""
Post = tuple[torch.Tensor, int]
"""A message and the rank it goes to or comes from."""


class Group:
    """Processes that send each other messages, apart from the process's default group."""

    def __init__(
        self,
        backend: str,
        rank: int,
        names: Sequence[str],
        address: str,
        port: int,
        timeout_s: float,
    ) -> None:
        """Meet the others at `address:port`, where rank 0 listens.

        `names` of all ranks are for messages.
        """
        self.names, self._backend = tuple(names), backend
        timeout = timedelta(seconds=timeout_s)
        # Serves the store if this process opened the port; `multi_tenant` below finds that one.
        host_meeting(port, timeout_s)
        store = dist.TCPStore(
            address, port, len(names), is_master=rank == 0, timeout=timeout, multi_tenant=True
        )
        self._store = store
        self._lost: str | None = None
        if backend == "gloo":
            self._group: Any = dist.ProcessGroupGloo(store, rank, len(names), timeout)
            return
        # One communicator for all messages: else a lone message takes one of its pair's, where its
        # peer's message, grouped with others, does not arrive.
        if backend == "nccl":
            self._group = dist.ProcessGroupNCCL(store, rank, len(names), timeout)
            self._group.eager_connect_single_device(
                torch.device("cuda", torch.cuda.current_device())
            )
        else:
            self._group = NCCLRules(store, rank, len(names), timeout)
            self._group.eager_connect_single_device()

    def exchange(self, sends: Sequence[Post], receives: Sequence[Post]) -> list[Any]:
        """Start to send and to receive (tensor, peer); the works in that order.

        Messages must stay as they are until `finish`. NCCL takes them as one group: one after the
        other, two processes that send to each other would each wait for the other to receive. After
        a message was lost the group refuses all others: a peer would take the next for the lost
        one.
        """
        if self._lost:
            raise SyncError(self._lost)
        if self._backend == "gloo" or not (sends or receives):
            return self._start(sends, receives)
        # torch's own `batch_isend_irecv` takes only groups that torch.distributed registered.
        self._group._start_coalescing()
        count = len(self._start(sends, receives))
        work = self._group._end_coalescing()
        # The group ends as one, so every message has the same work.
        return [work] * count

    def _start(self, sends: Sequence[Post], receives: Sequence[Post]) -> list[Any]:
        started = [self._begin(self._group.send, "a message to", post) for post in sends]
        return started + [
            self._begin(self._group.recv, "a message from", post) for post in receives
        ]

    def _begin(self, start: Callable[..., Any], what: str, post: Post) -> Any:
        """Start one message. Raises SyncError that names the peer when it is gone already."""
        message, peer = post
        try:
            # One tag for all: messages of a pair are taken in the order of buckets.
            return start([message], peer, 0)
        except RuntimeError as error:
            raise self._lose(what, peer, f": {error}") from error

    def finish(self, work: Any, peer: int, what: str, deadline: float) -> None:
        """Wait for a started message. Raises SyncError that names the peer."""
        try:
            done = self._completed(work, deadline)
        except RuntimeError as error:
            # An error before the deadline is the connection's: its text is worth showing.
            if time.monotonic() < deadline - _CLOCK_S:
                raise self._lose(what, peer, f": {error}") from error
            done = False  # gloo raises at a deadline too
        if not done:
            remedy = (
                "raise rollout.sync_timeout_s if the weights are really that large, "
                "or look into logs/"
            )
            raise self._lose(what, peer, f" did not end in time; {remedy}")

    def _completed(self, work: Any, deadline: float) -> bool:
        """Wait for a work; whether it ended in time. Raises RuntimeError where it failed."""
        left_s = deadline - time.monotonic()
        if left_s <= 0 or self._backend == "gloo":
            return left_s > 0 and work.wait(timedelta(seconds=left_s))
        pause_s = FIRST_PAUSE_S
        while not work.is_completed():  # NCCL's own wait with a deadline looks once a millisecond
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(PAUSE_GROWTH * pause_s, LONGEST_PAUSE_ON_GPU_S)
        work.wait()  # raises what went wrong; what this stream does next comes after the message
        return True

    def _lose(self, what: str, peer: int, how: str) -> SyncError:
        self._lost = f"sync_weights: {what} {self.names[peer]}{how}"
        return SyncError(self._lost)


@dataclass(frozen=True)
class MessageLayout:
    """Where the blocks of one bucket lie in a message, after the table [copies, 2]."""

    copies: tuple[Copy, ...]
    offsets: tuple[int, ...]
    num_bytes: int

    @classmethod
    def of(cls, copies: Sequence[Copy], item_bytes: int) -> MessageLayout:
        """The layout for these copies."""
        # The table comes first, at a fixed place: whoever receives knows the number of copies.
        offset = 16 * len(copies)  # the table: two int64 a copy
        offsets = []
        for copy in copies:
            offsets.append(offset)
            offset += round_up(volume(copy.box) * item_bytes, _ALIGN)
        return cls(tuple(copies), tuple(offsets), offset)

    @classmethod
    def by_bucket(cls, copies: Sequence[Sequence[Copy]], item_bytes: int) -> list[MessageLayout]:
        """The layouts of one sender's copies to one destination, by bucket."""
        return [cls.of(of_bucket, item_bytes) for of_bucket in copies]

    def table(self, message: torch.Tensor) -> torch.Tensor:
        """(policy version, fingerprint) of each copy, int64 [copies, 2]."""
        return message[: 16 * len(self.copies)].view(torch.int64).view(-1, 2)

    def block(self, message: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
        """The block of copy `number`, in the shape it has in its segment."""
        box, start = self.copies[number].box, self.offsets[number]
        stop = start + volume(box) * dtype.itemsize
        return message[start:stop].view(dtype).view(box_shape(box))
